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
    if (!close) return "–";
    const known = line.low && line.low[low] !== null;
    return shown(line.values[low]) + (known ? ` [${shown(line.low[low])}, ${shown(line.high[low])}]` : "");
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
    for (const plot of document.querySelectorAll(".plot:not(.scatter)")) {
      plot.setAttribute("aria-valuenow", at ?? last);
      if (plot === document.activeElement) plot.setAttribute("aria-valuetext", said(plot));
    }
  }

  const leave = (plot) => (plot.matches(".scatter") ? readPoint(plot, null) : read(null));

  function said(plot) {
    const lines = [...plot.closest("figure").querySelectorAll(".legend > span")];
    return `step ${at ?? bounds()[1]}: ${lines.map((line) => line.textContent.trim().replace(/\s+/g, " ")).join(", ")}`;
  }

  function point(event) {
    const plot = event.target.closest?.(".plot");
    if (!plot) return;
    if (plot.matches(".scatter")) return pointNearest(plot, event);
    const area = plot.querySelector(".panel").getBoundingClientRect();
    const [first, last] = bounds();
    read(Math.round(first + ((event.clientX - area.left) / area.width) * (last - first)));
  }

  // A plot of points, each with a text of its own: the nearest to the pointer is read, or the next with an arrow key.
  function readPoint(plot, number) {
    const points = (plot.points ??= JSON.parse(plot.dataset.points));
    plot.number = number === null ? null : Math.min(points.length - 1, Math.max(0, number));
    const chosen = plot.number === null ? null : points[plot.number];
    const output = plot.closest("figure").querySelector("output");
    output.value = chosen ? chosen.text : output.dataset.none;
    const ring = plot.querySelector(".ring");
    ring.hidden = !chosen;
    if (!chosen) return;
    ring.style.left = `${chosen.left}%`;
    ring.style.top = `${chosen.top}%`;
    plot.setAttribute("aria-valuenow", plot.number + 1);
    plot.setAttribute("aria-valuetext", chosen.text);
  }

  function pointNearest(plot, event) {
    const area = plot.querySelector(".panel").getBoundingClientRect();
    const points = (plot.points ??= JSON.parse(plot.dataset.points));
    const away = (at) => Math.hypot(area.left + (at.left / 100) * area.width - event.clientX,
      area.top + (at.top / 100) * area.height - event.clientY);
    readPoint(plot, points.reduce((best, at, number) => (away(at) < away(points[best]) ? number : best), 0));
  }

  document.addEventListener("pointermove", point);
  document.addEventListener("pointerdown", point);
  document.addEventListener("pointerout", (event) => { // a finger that is lifted leaves its values
    if (event.pointerType === "mouse" && event.target.closest?.(".plot") && !event.relatedTarget?.closest?.(".plot")) leave(event.target.closest(".plot"));
  });
  document.addEventListener("focusin", (event) => {
    const plot = event.target.closest?.(".plot");
    if (plot && !plot.matches(".scatter")) plot.setAttribute("aria-valuetext", said(plot));
  });
  document.addEventListener("keydown", (event) => {
    const plot = event.target.closest?.(".plot");
    if (!plot || event.ctrlKey || event.altKey || event.metaKey) return;
    const scatter = plot.matches(".scatter");
    const [first, last] = scatter ? [0, (plot.points ??= JSON.parse(plot.dataset.points)).length - 1] : bounds();
    const page = Math.max(1, Math.round((last - first) / 10));
    const now = scatter ? plot.number ?? -1 : at ?? last;
    const to = {
      ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1,
      PageDown: now - page, PageUp: now + page, Home: first, End: last, Escape: null,
    };
    if (!(event.key in to)) return;
    event.preventDefault();
    if (scatter) readPoint(plot, to[event.key]); else read(to[event.key]);
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
