/* What keeps a page current: a clock that ticks while the page is seen and the reader has not paused it, times in the
   reader's own zone, the choice of colours, and a question before a cancel. htmx listens for "tick". The road not taken
   is htmx's own `every 2s [visible]`, whose condition needs eval, which the content security policy forbids. */
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

  function localTimes() {
    for (const time of document.querySelectorAll("time[datetime]:not([title])")) {
      time.title = new Date(time.dateTime).toLocaleString();
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
  const changes = { childList: true, subtree: true, attributeFilter: ["title"] };
  new MutationObserver(localTimes).observe(document.body, changes);
  localTimes();
  setTimeout(tick, 1500);
})();
