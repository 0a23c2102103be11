/* What keeps a page current: a clock that ticks while the page is seen and the reader has not paused it, a line where
   nothing answers, times in the reader's own zone, the choice of colours, and a question before a cancel. htmx listens for
   "tick". The road not taken is htmx's own `every 2s [visible]`, whose condition needs eval, which the content security
   policy forbids. */
(() => {
  "use strict";
  let paused = false;
  const liveRegion = () => document.querySelector("[data-live]");
  const ended = () => document.querySelector("[data-ended]") !== null;

  const switchButton = document.getElementById("live-switch");
  if (switchButton && liveRegion()) {
    switchButton.hidden = false;
    switchButton.addEventListener("click", () => {
      paused = !paused;
      switchButton.setAttribute("aria-pressed", String(paused));
      switchButton.textContent = paused ? "Resume updates" : "Pause updates";
    });
  }

  function tick() {
    const region = liveRegion();
    if (!region) return;
    const seconds = Number(region.dataset.live.split(" ")[1]);
    setTimeout(tick, seconds * 1000);
    if (paused || document.visibilityState !== "visible") return;
    if (ended()) {
      /* One more look at the charts, then silence. */
      region.removeAttribute("data-live");
      if (switchButton) switchButton.hidden = true;
    } else {
      region.dispatchEvent(new CustomEvent("tick"));
    }
    document.dispatchEvent(new CustomEvent("satune:tick"));
  }

  /* An error leaves what is shown as it is; where the session has ended, the whole page asks to sign in. */
  document.addEventListener("htmx:response:error", (event) => {
    if (event.detail.ctx.response.status === 401) window.location.reload();
  });

  const away = document.getElementById("away");
  const dayTime = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
  const otherDay = { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  let answered = new Date();
  function hear(there) {
    if (!away) return;
    if (there) answered = new Date();
    const words = there ? "" : `No connection – shown as of ${answered.toLocaleTimeString("en", dayTime)}`;
    if (away.textContent !== words) away.textContent = words;
  }
  document.addEventListener("htmx:after:request", (event) => {
    const { status } = event.detail.ctx.response;
    if (status < 400 || status >= 500) hear(status < 400);
  });
  document.addEventListener("htmx:error", (event) => { if (event.detail.ctx) hear(false); });

  /* As `ago` of words.py says it. */
  function ago(moment) {
    const passed = (Date.now() - moment) / 1000;
    if (passed < 45) return "just now";
    for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
      if (passed >= size) return `${Math.round(passed / size)} ${unit} ago`;
    }
    return "1 min ago";
  }
  function clock(moment) {
    const today = moment.toDateString() === new Date().toDateString();
    return moment.toLocaleString("en", today ? dayTime : otherDay);
  }
  function localTimes() {
    for (const time of document.querySelectorAll("time[datetime]")) {
      const moment = new Date(time.dateTime);
      const words = time.classList.contains("clock") ? clock(moment) : ago(moment);
      if (time.textContent !== words) time.textContent = words;
      if (!time.title) time.title = moment.toLocaleString();
    }
  }

  document.getElementById("theme").addEventListener("change", (event) => {
    const theme = event.target.value;
    const age = theme ? 31536000 : 0;
    document.cookie = `satune_theme=${theme}; path=/; max-age=${age}; samesite=strict`;
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    document.dispatchEvent(new CustomEvent("satune:theme"));
  });

  document.addEventListener("submit", (event) => {
    const question = event.target.dataset.confirm;
    if (question && !window.confirm(question)) event.preventDefault();
  });

  /* Attributes too: what renews a part of the page takes those that it did not write. */
  const changes = { childList: true, characterData: true, subtree: true, attributeFilter: ["title"] };
  new MutationObserver(localTimes).observe(document.body, changes);
  localTimes();
  setInterval(() => { if (!paused) localTimes(); }, 15000);
  setTimeout(tick, 1500);
})();
