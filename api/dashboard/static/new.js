/* What a form cannot say by itself: that its plan is of before, and that a file is too large before it is sent. */
(() => {
  "use strict";
  const form = document.querySelector(".begin form");
  const stale = document.getElementById("stale");
  form.addEventListener("input", (event) => {
    if (stale) stale.hidden = false;
    const most = Number(event.target.dataset.most);
    const file = event.target.files && event.target.files[0];
    if (most) event.target.setCustomValidity(file && file.size > most ? `This service takes files of at most ${most.toLocaleString()} bytes.` : "");
  });
})();
