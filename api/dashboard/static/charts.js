/* The charts of a job page: rows after the last known step are asked for at each tick and appended; uPlot draws them.
   Every chart has a sentence beside it that says the same, since a canvas says nothing to a screen reader. The road not
   taken is a stream per tab: browsers hold six connections to a server, and the seventh tab would hang. */
(() => {
  "use strict";
  const box = document.getElementById("charts");
  if (!box || !window.uPlot) return;

  const data = { step: [], loss: [], eval_loss: [], omission_rate_mlp: [], omission_rate_attention: [], tokens_per_second: [], learning_rate: [] };
  let smooth = [];
  let lastStep = -1;
  let totalSteps = null;
  let busy = false;
  let ended = false;
  let plan = [];
  const plots = [];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const fixed = (value, digits) => (value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: Math.min(digits, 3) }));
  const share = (value) => (value == null ? "–" : `${Math.round(value * 100)}\u00a0%`);
  const last = (values) => { for (let i = values.length - 1; i >= 0; i--) if (values[i] != null) return values[i]; return null; };
  const most = (values) => values.reduce((high, value) => Math.max(high, value ?? 0), 0);
  const first = (values) => values.find((value) => value != null) ?? null;

  /* An average whose weight falls with distance in steps, with its start corrected; the raw line stays behind it. */
  function smoothed(steps, values) {
    const span = Math.max(4, steps.length / 40);
    const stride = steps.length > 1 ? (steps[steps.length - 1] - steps[0]) / (steps.length - 1) : 1;
    let sum = 0, weight = 0, before = null;
    return values.map((value, i) => {
      if (value == null) return weight ? sum / weight : null;
      const fade = before == null ? 0 : Math.exp(-(steps[i] - before) / (span * stride));
      sum = sum * fade + value; weight = weight * fade + 1; before = steps[i];
      return sum / weight;
    });
  }

  /* What the ladder still has before it: both ends of every planned phase after the last measured step. */
  function ahead() {
    const points = [];
    for (const phase of ended ? [] : plan) {
      for (const step of [phase.first, phase.last]) if (step > lastStep) points.push({ step, ...phase });
    }
    return points;
  }
  function withPlan() {
    const points = ahead();
    const blank = points.map(() => null);
    const from = (values) => data.step.map((_, i) => (points.length && i === data.step.length - 1 ? values[i] : null));
    return [
      [...data.step, ...points.map((p) => p.step)],
      [...data.omission_rate_mlp, ...blank],
      [...data.omission_rate_attention, ...blank],
      [...from(data.omission_rate_mlp), ...points.map((p) => p.mlp)],
      [...from(data.omission_rate_attention), ...points.map((p) => p.attention)],
    ];
  }

  const small = (value) => (value == null ? "–" : value === 0 ? "0" : value.toExponential(2));
  const stepped = window.uPlot.paths.stepped({ align: -1 });
  const line = (label, color, more) => ({ label, stroke: () => css(color), width: 2, spanGaps: true, points: { show: false }, ...more });
  /* Dots say where it was measured; many of them are only a thick line. */
  const dots = (color) => ({ show: (plot, i) => plot.data[i].reduce((n, v) => n + (v != null), 0) < 60, size: 7, fill: () => css(color), stroke: () => css("--card") });
  const number = (digits) => (_, value) => fixed(value, digits);

  const kinds = {
    loss: {
      series: [
        line("Each step", "--line-1-faint", { width: 1, value: number(4) }),
        line("Training, smoothed", "--line-1", { value: number(4) }),
        line("Held-out", "--line-2", { dash: [6, 4], points: dots("--line-2"), value: number(4) }),
      ],
      values: () => [data.step, data.loss, smooth, data.eval_loss],
      say: () => {
        const from = first(data.eval_loss), to = last(data.eval_loss);
        const held = from == null ? "" : `Held-out loss ${fixed(from, 3)}${to !== from ? `, now ${fixed(to, 3)}` : " before training"}.`;
        if (last(smooth) == null) return held;
        return `Training loss (smoothed) ${fixed(last(smooth), 3)} at step ${lastStep.toLocaleString("en")}. ${held}`.trim();
      },
    },
    omission: {
      range: [0, 1],
      axis: (_, ticks) => ticks.map((value) => share(value)),
      series: [
        line("MLP channels", "--line-1", { paths: stepped, fill: () => css("--line-1-wash"), value: (_, v) => share(v) }),
        line("Attention heads", "--line-2", { paths: stepped, dash: [6, 4], value: (_, v) => share(v) }),
        line("MLP, planned", "--line-1-faint", { paths: stepped, width: 1.5, value: (_, v) => share(v) }),
        line("Attention, planned", "--line-2-faint", { paths: stepped, width: 1.5, dash: [6, 4], value: (_, v) => share(v) }),
      ],
      values: withPlan,
      say: () => {
        const dense = !plan.length && !most(data.omission_rate_mlp) && !most(data.omission_rate_attention);
        if (dense) return "A dense run: every unit is trained at every step.";
        return `${ended ? "At the end" : "Now"} ${share(last(data.omission_rate_mlp))} of MLP channels and ${share(last(data.omission_rate_attention))} of attention heads are left out (at most ${share(most(data.omission_rate_mlp))} and ${share(most(data.omission_rate_attention))}).`;
      },
    },
    speed: {
      floor: true,
      series: [line("Tokens per second", "--line-1", { width: 1.5, value: number(0) })],
      values: () => [data.step, data.tokens_per_second],
      say: () => `${fixed(last(data.tokens_per_second), 0)} at step ${lastStep.toLocaleString("en")}.`,
    },
    rate: {
      floor: true,
      axis: (_, ticks) => ticks.map((value) => (value ? value.toExponential(1) : "0")),
      series: [line("Learning rate", "--line-1", { width: 1.5, value: (_, v) => small(v) })],
      values: () => [data.step, data.learning_rate],
      say: () => `${small(last(data.learning_rate))} at step ${lastStep.toLocaleString("en")}.`,
    },
  };

  function draw(figure) {
    const kind = kinds[figure.dataset.chart];
    const place = figure.querySelector(".plot");
    const axis = { stroke: () => css("--quiet"), grid: { stroke: () => css("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const y = {};
    if (kind.range) y.range = kind.range;
    else if (kind.floor) y.range = (_, low, high) => [0, high > 0 ? high * 1.1 : 1];
    const plot = new window.uPlot({
      width: place.clientWidth,
      height: figure.classList.contains("wide") ? 260 : 180,
      cursor: { sync: { key: "steps" }, points: { size: 7 } },
      hooks: { setSelect: [(u) => { if (u.select.width > 0) u.zoomed = true; }] },
      scales: { x: { time: false, range: (u, low, high) => (u.zoomed ? [low, high] : [low ?? 0, Math.max(totalSteps ?? 0, high ?? 1, 1)]) }, y },
      axes: [{ ...axis, size: 32, values: (_, ticks) => ticks.map((v) => (Number.isInteger(v) ? v.toLocaleString("en") : "")) }, { ...axis, size: 62, values: kind.axis }],
      series: [{ label: "Step", value: (_, v) => (v == null ? "–" : v.toLocaleString("en")) }, ...kind.series],
    }, kind.values(), place);
    /* The cells of the legend are made by uPlot and are reachable by mouse alone; the sentence says the same. */
    plot.root.querySelector(".u-legend")?.setAttribute("role", "presentation");
    plots.push({ plot, kind, place });
  }

  function redraw() {
    smooth = smoothed(data.step, data.loss);
    /* The evaluation before the first step is a row without a loss: something to say, and nothing to draw. */
    const begun = first(data.loss) != null;
    box.classList.toggle("drawn", begun);
    if (begun && !plots.length) box.querySelectorAll("[data-chart]").forEach(draw);
    for (const { plot, kind } of plots) {
      plot.setData(kind.values(), !plot.zoomed);
      if (plot.zoomed) plot.redraw();
      plot.root.classList.toggle("no-plan", !ahead().length);
    }
    for (const figure of box.querySelectorAll("[data-chart]")) {
      const kind = kinds[figure.dataset.chart], say = figure.querySelector(".summary");
      const unmeasured = ended ? "No step was measured." : "No step is measured yet.";
      const words = (begun || kind === kinds.loss) && kind.say() || unmeasured;
      if (say.textContent !== words) say.textContent = words;
    }
  }

  async function more() {
    if (busy) return;
    busy = true;
    try {
      const answer = await fetch(`${box.dataset.rows}?after=${lastStep}`, { headers: { accept: "application/json" } });
      if (!answer.ok) return;
      const body = await answer.json();
      totalSteps = body.total_steps;
      ended = body.ended;
      plan = body.plan;
      for (const row of body.rows) body.columns.forEach((name, i) => data[name]?.push(row[i]));
      lastStep = body.last_step;
      if (body.rows.length || ended) redraw();
    } catch {
      /* The server is away: the next tick asks again, and what is drawn stays. */
    } finally {
      busy = false;
    }
  }

  function recolour() {
    for (const { plot } of plots) {
      plot.redraw();
      plot.root.querySelectorAll(".u-marker").forEach((marker, i) => {
        if (i === 0) return;
        marker.style.borderColor = plot.series[i].stroke(plot, i);
        marker.style.background = plot.series[i].fill(plot, i) ?? "";
      });
    }
  }
  /* Charts zoom together. Before uPlot's own listener, which asks for the range. */
  box.addEventListener("dblclick", () => plots.forEach(({ plot }) => { plot.zoomed = false; }), true);
  document.addEventListener("satune:tick", more);
  document.addEventListener("satune:theme", recolour);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  new ResizeObserver(() => {
    for (const { plot, place } of plots) if (place.clientWidth !== plot.width) plot.setSize({ width: place.clientWidth, height: plot.height });
  }).observe(box);
  more();
})();
