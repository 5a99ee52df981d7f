"use strict";
// Values under the pointer, a finger or the arrow keys, in all plots at once; and a live page that renews itself.
(() => {
  const main = () => document.querySelector("main");
  const bounds = () => [Number(main().dataset.first), Number(main().dataset.last)];
  let at = null; // the step that is read; null: each line's last value

  const shown = (value) => String(Number(value.toPrecision(4)));

  // The value of a line at a step. A thinned line has a point for every few steps, of which the nearest is taken.
  function valueAt(line, step) {
    let low = 0, high = line.steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (line.steps[middle] < step) low = middle + 1; else high = middle;
    }
    if (low > 0 && step - line.steps[low - 1] < line.steps[low] - step) low -= 1;
    const close = line.bin === 1 ? line.steps[low] === step : Math.abs(line.steps[low] - step) <= line.bin;
    return close ? shown(line.values[low]) : "–";
  }

  function read(step) {
    const [first, last] = bounds();
    at = step === null ? null : Math.min(last, Math.max(first, step));
    main().classList.toggle("reading", at !== null);
    const across = first < last ? (at - first) / (last - first) : 0.5;
    main().style.setProperty("--at", `${100 * across}%`);
    for (const output of document.querySelectorAll("output[data-line]")) {
      output.line ??= JSON.parse(output.dataset.line);
      output.value = at === null ? output.dataset.last : valueAt(output.line, at);
    }
    for (const label of document.querySelectorAll(".step"))
      label.textContent = at === null ? `last step ${last}` : `step ${at}`;
    for (const plot of document.querySelectorAll(".plot")) {
      plot.setAttribute("aria-valuenow", at ?? last);
      if (plot === document.activeElement) plot.setAttribute("aria-valuetext", said(plot));
    }
  }

  function said(plot) {
    const lines = [...plot.closest("figure").querySelectorAll(".legend > span")];
    return `step ${at ?? bounds()[1]}: ${lines.map((line) => line.textContent.trim().replace(/\s+/g, " ")).join(", ")}`;
  }

  function point(event) {
    const plot = event.target.closest?.(".plot");
    if (!plot) return;
    const area = plot.querySelector(".panel").getBoundingClientRect();
    const [first, last] = bounds();
    read(Math.round(first + ((event.clientX - area.left) / area.width) * (last - first)));
  }

  document.addEventListener("pointermove", point);
  document.addEventListener("pointerdown", point);
  document.addEventListener("pointerout", (event) => { // a finger that is lifted leaves its values
    if (event.pointerType === "mouse" && event.target.closest?.(".plot") && !event.relatedTarget?.closest?.(".plot")) read(null);
  });
  document.addEventListener("focusin", (event) => {
    const plot = event.target.closest?.(".plot");
    if (plot) plot.setAttribute("aria-valuetext", said(plot));
  });
  document.addEventListener("keydown", (event) => {
    if (!event.target.closest?.(".plot") || event.ctrlKey || event.altKey || event.metaKey) return;
    const [first, last] = bounds();
    const page = Math.max(1, Math.round((last - first) / 10));
    const now = at ?? last;
    const to = {
      ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1,
      PageDown: now - page, PageUp: now + page, Home: first, End: last, Escape: null,
    };
    if (!(event.key in to)) return;
    event.preventDefault();
    read(to[event.key]);
  });

  // A live page asks its server every two seconds whether the run has gone on, and takes the new page's content.
  const EVERY = 2000;
  async function renew() {
    const live = document.querySelector(".live");
    try {
      const state = await (await fetch("/state", { cache: "no-store" })).json();
      live.textContent = "live";
      if (state.version === main().dataset.version) return;
      const text = await (await fetch("/", { cache: "no-store" })).text();
      const page = new DOMParser().parseFromString(text, "text/html");
      const focused = document.activeElement?.closest?.(".plot")?.id;
      main().replaceWith(page.querySelector("main"));
      document.title = page.title;
      if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
      if (at !== null && main().dataset.last !== undefined) read(at);
    } catch {
      live.textContent = "not live: the command that served this page has ended";
    }
  }
  if (document.documentElement.dataset.live !== undefined) setInterval(renew, EVERY);
})();
