"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = document.getElementById("charts");
  const runs = data.runs;
  const byId = new Map(runs.map((run) => [run.id, run]));
  const SVG = "http://www.w3.org/2000/svg";
  const WIDE = 1200;
  const FEW = 24;

  // ---- pieces of the page: text goes in as text, never as markup

  function html(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function svg(name, attributes = {}, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function canvas(width, height, label) {
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  }

  function section(title, ...extra) {
    const made = html("section", {}, html("div", { class: "top" }, html("h2", {}, title), ...extra));
    charts.append(made);
    return made;
  }

  // ---- numbers and scales

  const number = (text) => (text !== undefined && String(text).trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : null);

  function brief(value) {
    if (typeof value !== "number") return String(value).length > 24 ? `${String(value).slice(0, 23)}…` : String(value);
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(1).replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  }

  function seconds(value) {
    if (value < 60) return `${Number(value.toFixed(1))} s`;
    const whole = Math.round(value);
    if (whole < 3600) return `${Math.floor(whole / 60)}m${whole % 60 ? ` ${whole % 60}s` : ""}`;
    return `${Math.floor(whole / 3600)}h${whole % 3600 ? ` ${Math.floor((whole % 3600) / 60)}m` : ""}`;
  }

  function steps(low, high, count) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
    const found = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) found.push(Number((index * step).toPrecision(12)));
    return found;
  }

  function numeric(values, from, to, { pad = 0.04, count = 5 } = {}) {
    let low = Math.min(...values);
    let high = Math.max(...values);
    const log = low > 0 && high / low >= 100;
    if (log) [low, high] = [Math.log10(low), Math.log10(high)];
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    const room = (high - low) * pad;
    const place = (value) => from + (((log ? Math.log10(value) : value) - low + room) / (high - low + 2 * room)) * (to - from);
    let ticks = log
      ? steps(low, high, count).filter(Number.isInteger).map((power) => 10 ** power)
      : steps(low, high, count);
    if (log && ticks.length < 2) ticks = [10 ** low, 10 ** high];
    return { place, ticks, log, format: brief };
  }

  function named(values, from, to) {
    const places = new Map(values.map((value, index) => [value, from + ((index + 0.5) / values.length) * (to - from)]));
    const every = Math.ceil(values.length / 12);
    return { place: (value) => places.get(value), ticks: values.filter((_, index) => index % every === 0), log: false, format: brief };
  }

  // A parameter is a number if all its values are.
  function axis(name, some, from, to, options) {
    const texts = [...new Set(some.map((run) => run.params[name]).filter((text) => text !== undefined))];
    const isNumeric = texts.length > 0 && texts.every((text) => number(text) !== null);
    const read = (run) => (isNumeric ? number(run.params[name]) : run.params[name]);
    const scale = isNumeric ? numeric(texts.map(Number), from, to, options) : named(texts.sort(), from, to);
    return { ...scale, read: (run) => (run.params[name] === undefined ? null : read(run)) };
  }

  const metricOf = (run) => (Object.hasOwn(run.metrics, data.metric) ? run.metrics[data.metric] : null);
  const measured = () => runs.filter((run) => run.latest && metricOf(run) !== null);

  function best() {
    const good = measured().filter((run) => run.status === "FINISHED");
    const sign = data.goal === "max" ? -1 : 1;
    return good.reduce((one, other) => (one === null || sign * metricOf(other) < sign * metricOf(one) ? other : one), null);
  }

  // ---- pointing at a run shows it everywhere

  const tip = html("div", { id: "tip", role: "status" });
  document.body.append(tip);

  function describe(run) {
    const lines = [`point ${run.index}${run.attempt > 1 ? `, attempt ${run.attempt}` : ""}: ${run.status}`];
    for (const [name, value] of Object.entries(run.params)) lines.push(`${name} = ${brief(value)}`);
    if (metricOf(run) !== null) lines.push(`${data.metric} = ${Number(metricOf(run).toPrecision(6))}`);
    if (run.started !== null && run.started > run.created) lines.push(`waited ${seconds((run.started - run.created) / 1000)}`);
    if (run.started !== null && run.ended !== null) lines.push(`ran ${seconds((run.ended - run.started) / 1000)}`);
    return lines.join("\n");
  }

  let picked = null;
  function pick(id) {
    if (id === picked) return;
    picked = id;
    document.body.classList.toggle("picked", id !== null);
    for (const each of document.querySelectorAll(".picked[data-run]")) each.classList.remove("picked");
    if (id === null) return;
    for (const each of document.querySelectorAll(`[data-run="${CSS.escape(id)}"]`)) each.classList.add("picked");
  }

  document.addEventListener("pointerover", (event) => {
    const target = event.target.closest("[data-run]");
    pick(target ? target.dataset.run : null);
    const inChart = target && target.closest("svg");
    tip.style.display = inChart ? "block" : "none";
    if (inChart) tip.textContent = describe(byId.get(target.dataset.run));
  });
  document.addEventListener("pointermove", (event) => {
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  });

  // ---- the timeline

  // Time in which nothing ran (a sweep that was resumed the next day) is left out.
  function clock(some) {
    const spans = some.map((run) => [run.created, run.ended ?? run.started ?? run.created]).sort((a, b) => a[0] - b[0]);
    const active = [];
    for (const [from, to] of spans) {
      const last = active[active.length - 1];
      if (last && from <= last[1]) last[1] = Math.max(last[1], to);
      else active.push([from, to]);
    }
    const busy = active.reduce((sum, [from, to]) => sum + to - from, 0);
    const longest = Math.max(60000, busy * 0.2);
    const gaps = [];
    let cut = 0;
    for (let index = 1; index < active.length; index += 1) {
      const idle = active[index][0] - active[index - 1][1];
      if (idle > longest) {
        const kept = Math.max(busy * 0.03, 1);
        gaps.push({ at: active[index][0], cut: idle - kept, idle, kept });
        cut += idle - kept;
      }
    }
    const begin = active[0][0];
    const total = Math.max(active[active.length - 1][1] - begin - cut, 1);
    const shown = (time) => time - begin - gaps.reduce((sum, gap) => sum + (time >= gap.at ? gap.cut : 0), 0);
    return { shown, total, gaps };
  }

  // Few runs get a row each; many share rows as they shared the machine.
  function rows(some, ended) {
    if (some.length <= FEW) return some.map((_, place) => place);
    const free = [];
    return some.map((run) => {
      let lane = free.findIndex((time) => time <= run.created);
      if (lane < 0) lane = free.push(0) - 1;
      free[lane] = ended(run);
      return lane;
    });
  }

  function timeline() {
    const some = runs.filter((run) => run.created !== null).sort((a, b) => a.created - b.created || a.index - b.index);
    if (!some.length) return;
    const legend = html("span", { class: "legend" });
    const names = [["waited", "waits"], ...["FINISHED", "FAILED", "KILLED", "RUNNING"].filter((each) => runs.some((run) => run.status === each)).map((each) => [each.toLowerCase(), each])];
    for (const [text, colour] of names) {
      const swatch = html("i");
      swatch.style.background = `var(--${colour})`;
      legend.append(html("span", {}, swatch, text));
    }
    const made = section("Timeline", legend);
    const newest = Math.max(...some.map((run) => run.ended ?? run.started ?? run.created));
    const ended = (run) => run.ended ?? newest;
    const lanes = rows(some, ended);
    const count = Math.max(...lanes) + 1;
    const row = Math.max(2, Math.min(16, 640 / count));
    const [left, top] = [34, 6];
    const height = count * row;
    const { shown, total, gaps } = clock(some);
    const x = (time) => left + (shown(time) / total) * (WIDE - left - 10);
    const drawn = canvas(WIDE, top + height + 22, "when each run waited and ran");
    for (const tick of steps(0, total / 1000, 8)) {
      const at = left + ((tick * 1000) / total) * (WIDE - left - 10);
      drawn.append(svg("line", { class: "grid", x1: at, x2: at, y1: top, y2: top + height }));
      drawn.append(svg("text", { x: at, y: top + height + 15, "text-anchor": "middle" }, seconds(tick)));
    }
    for (const gap of gaps) {
      const at = x(gap.at) - ((gap.kept / 2) / total) * (WIDE - left - 10);
      drawn.append(svg("line", { class: "gap", x1: at, x2: at, y1: top, y2: top + height }));
      drawn.append(svg("text", { x: at + 4, y: top + height - 4 }, `${seconds(gap.idle / 1000)} later`));
    }
    some.forEach((run, place) => {
      const y = top + lanes[place] * row;
      const end = ended(run);
      const started = run.started ?? end;
      const bar = (from, to, colour) => {
        const drawnBar = svg("rect", { "data-run": run.id, x: x(from), y: y + row * 0.12, width: Math.max(x(to) - x(from), 0.8), height: row * 0.76, rx: Math.min(2, row / 6) });
        drawnBar.style.fill = `var(--${colour})`;
        drawn.append(drawnBar);
      };
      if (started > run.created) bar(run.created, started, "waits");
      if (run.started !== null) bar(started, Math.max(end, started), run.status);
      if (some.length <= FEW) drawn.append(svg("text", { x: left - 6, y: y + row / 2 + 4, "text-anchor": "end" }, String(run.index)));
    });
    made.append(drawn);
  }

  // ---- the metric against each parameter

  function scatter(name) {
    const [width, height, left, bottom, top] = [380, 250, 48, 38, 20];
    const some = measured().filter((run) => run.params[name] !== undefined);
    const drawn = canvas(width, height, `${data.metric} against ${name}`);
    if (!some.length) return drawn;
    const across = axis(name, some, left, width - 8, { count: 5 });
    const up = numeric(some.map(metricOf), height - bottom, top, { count: 5 });
    for (const tick of up.ticks) {
      drawn.append(svg("line", { class: "grid", x1: left, x2: width - 8, y1: up.place(tick), y2: up.place(tick) }));
      drawn.append(svg("text", { x: left - 6, y: up.place(tick) + 4, "text-anchor": "end" }, up.format(tick)));
    }
    for (const tick of across.ticks) {
      const at = across.place(tick);
      drawn.append(svg("line", { class: "grid", x1: at, x2: at, y1: top, y2: height - bottom }));
      drawn.append(svg("text", { x: at, y: height - bottom + 15, "text-anchor": "middle" }, across.format(tick)));
    }
    drawn.append(svg("text", { class: "name", x: (left + width) / 2, y: height - 5, "text-anchor": "middle" }, name));
    drawn.append(svg("text", { x: left, y: 11 }, data.metric + (up.log ? " (log)" : "")));
    const winner = best();
    // The best one on top.
    for (const run of [...some].sort((a, b) => (a === winner) - (b === winner))) {
      const dot = svg("circle", { "data-run": run.id, "data-x": run.params[name], "data-y": metricOf(run), cx: across.place(across.read(run)), cy: up.place(metricOf(run)), r: run === winner ? 6 : 4 });
      dot.style.fill = `var(--${run === winner ? "best" : run.status})`;
      if (run === winner) dot.style.fillOpacity = 1;
      drawn.append(dot);
    }
    return drawn;
  }

  // ---- parallel coordinates

  function parallel() {
    const [height, top, bottom, side] = [300, 34, 16, 70];
    const some = measured();
    const drawn = canvas(WIDE, height, "parallel coordinates");
    if (!some.length || !data.params.length) return drawn;
    const values = numeric(some.map(metricOf), height - bottom, top, { pad: 0.02 });
    const axes = data.params.map((name) => ({ name, ...axis(name, some, height - bottom, top, { pad: 0.02 }) }));
    axes.push({ name: data.metric, ...values, read: metricOf });
    const x = (index) => side + (index / (axes.length - 1)) * (WIDE - 2 * side);
    const sign = data.goal === "max" ? 1 : -1;
    const order = [...some].sort((a, b) => sign * (metricOf(a) - metricOf(b)));
    const winner = best();
    order.forEach((run, rank) => {
      const points = axes.map((each, index) => [x(index), each.read(run)]).filter(([, value]) => value !== null);
      const path = points.map(([at, value], index) => `${index ? "L" : "M"}${at},${axes.find((_, place) => x(place) === at).place(value)}`).join("");
      const line = svg("path", { "data-run": run.id, d: path });
      const share = order.length > 1 ? Math.round((100 * rank) / (order.length - 1)) : 100;
      line.style.stroke = run === winner ? "var(--best)" : `color-mix(in oklab, var(--to) ${share}%, var(--from))`;
      if (run === winner) line.style.strokeWidth = 2.6;
      if (run === winner) line.style.strokeOpacity = 1;
      drawn.append(line);
    });
    axes.forEach((each, index) => {
      const at = x(index);
      drawn.append(svg("line", { class: "axis", x1: at, x2: at, y1: top, y2: height - bottom }));
      drawn.append(svg("text", { class: "name", x: at, y: 13, "text-anchor": "middle" }, each.name));
      const last = index === axes.length - 1;
      for (const tick of each.ticks) drawn.append(svg("text", { x: at + (last ? 7 : -7), y: each.place(tick) + 4, "text-anchor": last ? "start" : "end" }, each.format(tick)));
    });
    return drawn;
  }

  // ---- the table

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.addEventListener("click", () => {
        const ascending = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        const value = (row) => row.cells[column].dataset.value;
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [one, other] = [value(a), value(b)];
          // What has no value comes last, whichever way.
          if (one === undefined || other === undefined) return (one === undefined) - (other === undefined);
          const [left, right] = [number(one), number(other)];
          const order = left !== null && right !== null ? left - right : one.localeCompare(other);
          return ascending ? order : -order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  // ---- all of it

  timeline();
  if (data.metric !== null) {
    const choose = (label, options, chosen, change) => {
      const select = html("select");
      for (const each of options) select.append(html("option", each === chosen ? { selected: "" } : {}, each));
      select.addEventListener("change", () => { change(select.value); draw(); });
      return html("label", {}, `${label} `, select);
    };
    const metric = choose("metric", data.metrics, data.metric, (value) => { data.metric = value; });
    const goal = choose("best is", ["min", "max"], data.goal, (value) => { data.goal = value; });
    const legend = html("span", { class: "legend" });
    const dots = section("Metric against each parameter", metric, goal, legend);
    const panels = html("div", { class: "panels" });
    dots.append(panels);
    const lines = section("Parallel coordinates");
    const holder = html("div");
    lines.append(holder);
    const draw = () => {
      panels.replaceChildren(...data.params.map(scatter));
      holder.replaceChildren(parallel());
      const winner = best();
      legend.textContent = winner ? `best: point ${winner.index} with ${Number(metricOf(winner).toPrecision(6))}` : "";
    };
    draw();
  }
  sortable(document.querySelector("#runs table"));
})();
