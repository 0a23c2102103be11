"""Numbers, times and states in the words of a person; used by the templates as filters."""

import re
import time
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

DASH = "\N{EN DASH}"

STATUS_WORDS = {
    "validating_files": "Checking data",
    "queued": "Queued",
    "running": "Running",
    "paused": "Paused",
    "succeeded": "Succeeded",
    "failed": "Failed",
    "cancelled": "Cancelled",
}

STATE_WORDS = {
    "waiting_for_worker": "waiting for a worker",
    "waiting_for_gpu": "waiting for a free slot",
    "starting": "starting",
    "retrying": "waiting to try again",
    "checking_dataset": "reading the data set",
    "tokenizing": "turning text into tokens",
    "loading_model": "loading the model",
    "training_dense": "dense",
    "training_dense_start": "dense start",
    "training_sparse": "sparse stage",
    "training_ladder": "coming down the ladder",
    "training_dense_finish": "dense finish",
    "evaluating": "evaluating on held-out data",
    "saving": "saving the model",
    "cancelling": "stopping after this step",
    "pausing": "pausing after this step",
    "resuming": "going on after this stop",
    "by_user": "as you asked",
    "done": "done",
}

# What a person can do about a failure; the message of the failure itself stands above it.
FAILURE_HELP = {
    "dataset_invalid": "Correct the named rows and upload the file again.",
    "not_found": "Check the model's name and this machine's network, or put the model below a model root.",
    "model_unsupported": "Choose a model of a supported family; the guide lists them.",
    "out_of_memory": "Lower sat.train.micro_batch_size or sat.train.max_seq_len; the batch size may stay.",
    "loss_not_finite": "Lower the learning rate, or the omission rate; then look at the last steps in the chart.",
    "no_checkpoint": "Start the job anew; the checkpoint it was to go on from is not whole.",
    "checkpoint_unsupported": "Train it on with the release of Satune that wrote the checkpoint, or start the job anew.",
    "worker_lost": "The machine or its worker went away several times. Start a new job once it stays up.",
    "internal_error": "The training process ended without a reason. The log in its run folder may name one.",
    "invalid_value": "Correct the named setting and start a new job.",
}
FAILURE_OTHER = "The events below and the log in the run folder say more."


def number(value: Any, digits: int = 0) -> str:
    """A number with thousands separated, or a dash."""
    return DASH if value is None else f"{float(value):,.{digits}f}"


def short(value: Any) -> str:
    """A large number in few characters: 1,234 -> 1.23k."""
    if value is None:
        return DASH
    size = float(value)
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(size) >= limit:
            return f"{size / limit:.3g}{unit}"
    return f"{size:.3g}"


def flop(value: Any) -> str:
    """Operations with the unit's prefix: 1.9e14 -> 190 TFLOP."""
    text = short(value)
    head, prefix = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return text if value is None else f"{head} {prefix}FLOP"


def percent(value: Any, digits: int = 0) -> str:
    """A share as a percentage, or a dash."""
    return DASH if value is None else f"{100 * float(value):.{digits}f}\N{NO-BREAK SPACE}%"


def duration(seconds: Any) -> str:
    """Seconds as the two largest units."""
    if seconds is None:
        return DASH
    left = max(0, round(float(seconds)))
    if left < 60:
        return f"{left} s"
    if left < 3600:
        return f"{left // 60} min {left % 60:02d} s"
    if left < 86400:
        return f"{left // 3600} h {left % 3600 // 60:02d} min"
    return f"{left // 86400} d {left % 86400 // 3600} h"


def ago(moment: Any) -> str:
    """How long ago a Unix time was."""
    if moment is None:
        return DASH
    passed = time.time() - float(moment)
    if passed < 45:
        return "just now"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= size:
            return f"{round(passed / size)} {unit} ago"
    return "1 min ago"


def clock(value: Any) -> str:
    """The time of day of a Unix time, in UTC until the browser shows it in the reader's zone."""
    return datetime.fromtimestamp(float(value), UTC).strftime("%H:%M:%S")


def moment(value: Any) -> str:
    """A Unix time in ISO form for `<time datetime>`; the browser shows it in the reader's zone."""
    return datetime.fromtimestamp(float(value), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def mean_speed(summary: Any) -> float | None:
    """Tokens per second of the training steps of a whole run, from its summary."""
    seconds = (summary or {}).get("training_seconds")
    tokens = (summary or {}).get("trained_tokens")
    return tokens / seconds if tokens and seconds else None


def size(value: Any) -> str:
    """Bytes in binary units."""
    left = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if left < 1024:
            return f"{left:.0f} {unit}" if unit == "B" else f"{left:.1f} {unit}"
        left /= 1024
    return f"{left:.1f} TiB"


def status_word(status: str) -> str:
    """A status as a person says it."""
    return STATUS_WORDS.get(status, status)


def state_words(state: str) -> str:
    """A detailed state as a person says it; an unknown one is shown as it is."""
    return STATE_WORDS.get(state, state.replace("_", " "))


def failure_help(code: str) -> str:
    """What to do about a failure."""
    return FAILURE_HELP.get(code, FAILURE_OTHER)


def code(text: str) -> Markup:
    """Text in which backticks mark code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped


FILTERS = {
    "code": code,
    "number": number,
    "short": short,
    "flop": flop,
    "mean_speed": mean_speed,
    "percent": percent,
    "duration": duration,
    "ago": ago,
    "clock": clock,
    "moment": moment,
    "size": size,
    "status_word": status_word,
    "state_words": state_words,
    "failure_help": failure_help,
}
