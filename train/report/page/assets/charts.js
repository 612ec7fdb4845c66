// Figures, by Observable Plot. Colours are names of page.css, so that light and dark need no redraw.
"use strict";

(() => {
  const {el, number} = paravt;
  const SERIES = ["var(--s1)", "var(--s2)", "var(--s3)", "var(--s4)", "var(--s5)", "var(--s6)"];

  const STEP = {label: "step", labelAnchor: "right", labelArrow: "none", labelOffset: 32, tickSize: 0, tickFormat: (v) => (Number.isInteger(v) ? String(v) : "")};

  // A figure with a caption and keys, drawn anew whenever its width changes.
  function figure(title, keys, draw, options = {}) {
    const plot = el("div", {class: "plot"});
    const save = el("button", {class: "quiet save", title: "Save as SVG", onclick: () => saveSvg(plot, title)}, "SVG");
    const caption = title ? el("figcaption", {}, el("h3", {}, title), el("span", {class: "keys"}, keys), save) : null;
    const whole = el("figure", {class: options.wide ? "wide" : null}, caption, plot);
    let width = 0;
    new ResizeObserver(([entry]) => {
      const now = Math.floor(entry.contentRect.width);
      if (!now || Math.abs(now - width) < 2) return;
      width = now;
      plot.replaceChildren(draw(width));
    }).observe(plot);
    return whole;
  }

  const key = (name, color, kind = "") => el("span", {class: `key ${kind}`, style: {"--key": color}}, name);

  // As a file of its own: colours written out.
  function saveSvg(plot, title) {
    const svg = plot.querySelector("svg").cloneNode(true);
    const style = getComputedStyle(document.documentElement);
    const told = (text) => text.replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim() || "currentColor");
    for (const node of [svg, ...svg.querySelectorAll("*")]) {
      for (const attribute of node.attributes) attribute.value = told(attribute.value);
    }
    svg.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    svg.setAttribute("style", `color:${told("var(--soft)")};font-family:Helvetica,Arial,sans-serif;font-size:11px`);
    const file = new Blob([new XMLSerializer().serializeToString(svg)], {type: "image/svg+xml"});
    const anchor = el("a", {href: URL.createObjectURL(file), download: `${title.replace(/\W+/g, "_")}.svg`});
    anchor.click();
    setTimeout(() => URL.revokeObjectURL(anchor.href), 1000);
  }

  // series: [{name, color, steps, values, band: [[step, low, high]], dashed}]
  function curves(title, series, options = {}) {
    const shown = series.filter((own) => own.values.some((value) => value != null));
    const keys = shown.filter((own) => !own.dashed).map((own) => key(`${own.name} ${(options.format || number)(last(own.values))}`, own.color));
    return figure(title, keys, (width) => drawCurves(title, shown, options, width), options);
  }

  const last = (values) => values.findLast((value) => value != null);

  function drawCurves(title, series, options, width) {
    const marks = [Plot.gridY({stroke: "var(--line)", strokeOpacity: 1, ticks: options.log ? 3 : 4})];
    for (const own of series) marks.push(...curve(own, options));
    const rows = series.flatMap((own) => points(own, options).map((point) => ({...point, name: own.name})));
    marks.push(
      Plot.ruleX(rows, Plot.pointerX({x: "step", stroke: "var(--faint)"})),
      Plot.tip(rows, Plot.pointerX({
        x: "step", y: "value", fill: "var(--paper)", stroke: "var(--faint)",
        title: (point) => `step ${point.step}\n${series.length > 1 ? `${point.name}  ` : ""}${(options.format || number)(point.value)}`,
      }))
    );
    const svg = Plot.plot({
      ariaLabel: title, width, height: options.height || 200, marginLeft: 42, marginRight: 8, marginTop: 10, marginBottom: 36,
      x: {...STEP, ticks: Math.min(6, Math.ceil(width / 70)), inset: 3},
      y: {label: null, ticks: 4, tickSize: 0, nice: true, zero: options.zero, type: options.log ? "log" : "linear", tickFormat: options.log ? "~e" : (v) => number(v)},
      marks,
    });
    if (options.onstep) {
      svg.style.cursor = "pointer";
      svg.addEventListener("click", () => svg.value && options.onstep(svg.value.step));
    }
    return svg;
  }

  const points = (own, options) => own.steps
    .map((step, at) => ({step, value: own.values[at]}))
    .filter((point) => point.value != null && (!options.log || point.value > 0));

  function curve(own, options) {
    const rows = points(own, options), few = rows.length < 12;
    const k = Math.max(1, Math.round(rows.length / 20));
    const line = {x: "step", y: "value", stroke: own.color};
    const smooth = k > 1 ? Plot.windowY({k, reduce: "mean", anchor: "middle"}, line) : line;
    return [
      own.band && Plot.areaY(own.band, {x: (b) => b[0], y1: (b) => b[1], y2: (b) => b[2], fill: own.color, fillOpacity: 0.13}),
      k > 1 && Plot.lineY(rows, {...line, strokeWidth: 1, strokeOpacity: 0.3}),
      Plot.lineY(rows, {...smooth, strokeWidth: 1.8, strokeDasharray: own.dashed ? "4 3" : null}),
      few && Plot.dotY(rows, {...line, fill: own.color, r: 2}),
    ].filter(Boolean);
  }

  // Seconds by part, stacked.
  function areas(title, steps, parts, options = {}) {
    const rows = parts.flatMap((part) => steps.map((step, at) => ({step, value: part.values[at] || 0, name: part.name})));
    const keys = parts.map((part) => key(part.name, part.color, "box"));
    const color = {domain: parts.map((part) => part.name), range: parts.map((part) => part.color)};
    const bars = steps.length < 40;
    return figure(title, keys, (width) => Plot.plot({
      width, height: 200, marginLeft: 42, marginRight: 8, marginTop: 10, marginBottom: 36, color,
      x: bars ? {...STEP, type: "band", padding: 0.15, tickFormat: (v) => (v % Math.ceil(steps.length / 6) ? "" : String(v))} : {...STEP, ticks: 6},
      y: {label: null, ticks: 4, tickSize: 0, tickFormat: (v) => number(v)},
      marks: [
        Plot.gridY({stroke: "var(--line)", strokeOpacity: 1}),
        bars ? Plot.barY(rows, Plot.stackY({x: "step", y: "value", fill: "name", title: (d) => `step ${d.step}\n${d.name}  ${number(d.value)} s`, tip: {fill: "var(--paper)"}}))
          : Plot.areaY(rows, Plot.stackY({x: "step", y: "value", fill: "name", fillOpacity: 0.85})),
      ],
    }), options);
  }

  // Where it looks: the share of rollouts that looked at each distance from the gold window.
  function heat(title, look) {
    const half = look.offsets.length > 1 ? (look.offsets[1] - look.offsets[0]) / 2 : 0.5;
    const rows = look.shares.flatMap((column, at) => column.map((share, place) => ({
      x1: look.steps[at], x2: look.steps[at] + look.steps_per_column,
      y1: look.offsets[place] - half, y2: look.offsets[place] + half, share,
    }))).filter((cell) => cell.share != null);
    const keys = [key("none", "var(--line)", "box"), key("every rollout", "var(--accent)", "box"), key("the gold window", "var(--gold)")];
    const edge = look.gold_width / 2;
    return figure(title, keys, (width) => Plot.plot({
      width, height: Math.min(300, Math.max(210, width / 3)), marginLeft: 52, marginRight: 8, marginBottom: 36, marginTop: 8,
      x: STEP,
      y: {label: null, tickSize: 0, ticks: 5, domain: [-1, 1], tickFormat: (v) => (v ? `${v > 0 ? "+" : "−"}${Math.abs(100 * v)} %` : "gold")},
      opacity: {domain: [0, 1], range: [0.03, 1]},
      marks: [
        Plot.rect(rows, {x1: "x1", x2: "x2", y1: "y1", y2: "y2", fill: "var(--accent)", fillOpacity: "share", inset: 0.2,
          title: (cell) => `step ${cell.x1}${cell.x2 - cell.x1 > 1 ? ` to ${cell.x2 - 1}` : ""}\n${number((cell.y1 + cell.y2) * 50)} % of the video from the gold window\n${paravt.percent(cell.share)} of rollouts looked here`,
          tip: {fill: "var(--paper)"}}),
        Plot.ruleY([-edge, edge], {stroke: "var(--gold)", strokeWidth: 1.6}),
      ],
    }), {wide: true});
  }

  // Means with their intervals, before and after.
  function intervals(title, rows, options = {}) {
    const names = [...new Set(rows.map((row) => row.when))];
    const color = {domain: ["before", "after"], range: ["var(--faint)", "var(--accent)"]};
    const keys = names.map((name) => key(name, name === "after" ? "var(--accent)" : "var(--faint)", "box"));
    return figure(title, keys, (width) => Plot.plot({
      width, marginLeft: 120, marginRight: 52, marginTop: 4, marginBottom: 26, color,
      height: 34 + 44 * new Set(rows.map((row) => row.mode)).size,
      x: {label: null, domain: [0, 1], ticks: 5, tickSize: 0, tickFormat: (v) => String(v)},
      fy: {label: null, padding: 0.12, domain: [...new Set(rows.map((row) => row.mode))]},
      y: {axis: null, domain: names, padding: 0.25},
      marks: [
        Plot.gridX({stroke: "var(--line)", strokeOpacity: 1, ticks: 5}),
        Plot.ruleY(rows, {x1: "low", x2: "high", y: "when", fy: "mode", stroke: "when", strokeWidth: 2.2}),
        Plot.dot(rows, {x: "mean", y: "when", fy: "mode", fill: "when", r: 4.2}),
        Plot.text(rows, {x: "high", y: "when", fy: "mode", text: (row) => number(row.mean, 2), dx: 7, textAnchor: "start", fill: "var(--ink)"}),
      ],
    }), options);
  }

  const VERDICTS = {
    hit: {fill: "var(--accent)"},
    miss: {fill: "var(--faint)", fillOpacity: 0.55},
    ran: {fill: "var(--s3)", fillOpacity: 0.75},
    invalid: {fill: "var(--bad)", fillOpacity: 0.12, stroke: "var(--bad)", strokeDasharray: "3 2"},
  };

  // A rollout on the video's time: overview frames, the gold window, calls in lanes of their own.
  function timeline(group, rollout, options = {}) {
    const lanes = rollout.calls.map((call, at) => ({...call, at, lane: `call ${at + 1}`}));
    const wide = !options.small;
    const end = group.duration || Math.max(1, ...lanes.map((call) => (call.window ? call.window[1] : 0)));
    const times = (group.overview_times[0] || []).map((time) => ({time, lane: "overview"}));
    const keys = wide ? [key("gold window", "var(--gold)", "box"), key("hit", "var(--accent)", "box"), key("miss", "var(--faint)", "box"), key("invalid", "var(--bad)", "dashed")] : [];
    const domain = [...(wide ? ["overview"] : []), ...lanes.map((call) => call.lane)];
    const height = wide ? 62 + 26 * Math.max(1, domain.length) : Math.max(24, 9 * Math.max(1, lanes.length) + 8);
    return figure(options.title, keys, (width) => Plot.plot({
      ariaLabel: `${lanes.length} calls on the time of the video`, width, height, marginLeft: wide ? 62 : 4, marginRight: wide ? 92 : 4, marginTop: wide ? 6 : 4, marginBottom: wide ? 30 : 4,
      x: {domain: [0, end], label: null, tickSize: 0, axis: wide ? "bottom" : null, ticks: Math.min(9, Math.ceil(width / 80)), tickFormat: (v) => paravt.clock(v)},
      y: {domain: domain.length ? domain : ["none"], label: null, tickSize: 0, axis: wide ? "left" : null, padding: wide ? 0.3 : 0.18},
      marks: [
        wide ? Plot.gridX({stroke: "var(--line)", strokeOpacity: 1}) : Plot.frame({stroke: "var(--line)"}),
        Plot.rect(group.gold || [], {x1: (w) => w[0], x2: (w) => w[1], fill: "var(--gold)", fillOpacity: 0.26, insetTop: -4, insetBottom: -4}),
        Plot.ruleX(group.gold || [], {x: (w) => w[0], stroke: "var(--gold)"}),
        Plot.ruleX(group.gold || [], {x: (w) => w[1], stroke: "var(--gold)"}),
        wide ? Plot.tickX(times, {x: "time", y: "lane", stroke: "var(--ink)", strokeWidth: 1.6}) : Plot.tickX(times, {x: "time", stroke: "var(--faint)", strokeOpacity: 0.6}),
        ...Object.entries(VERDICTS).map(([verdict, style]) => Plot.barX(
          lanes.filter((call) => call.verdict === verdict && call.window),
          {x1: (c) => Math.min(c.window[0], end), x2: (c) => Math.min(c.window[1], end), y: "lane", rx: 2, ...style, ...(options.href ? {href: (c) => options.href(c.at)} : {})}
        )),
        wide && Plot.text(lanes, {
          x: (c) => (c.window ? Math.min(c.window[1], end) : 0), y: "lane", dx: 6, textAnchor: "start", fill: "var(--ink)",
          text: (c) => (c.verdict === "hit" ? `sees ${paravt.percent(c.gold_seen)}` : c.verdict === "miss" ? "miss" : c.verdict === "invalid" ? (c.window ? "invalid" : "invalid, no window") : ""),
        }),
      ].filter(Boolean),
    }), {wide: true});
  }

  // Terms of the reward one after the other.
  function rewardBar(rewards) {
    const shared = new Set(["total", "task", "anchor"]);
    const terms = Object.entries(rewards).filter(([name]) => !shared.has(name));
    const rest = rewards.total - terms.reduce((sum, [, value]) => sum + value, 0);
    if (Math.abs(rest) > 1e-3) terms.push(["other terms and weights", rest]);
    const rows = terms.map(([name, value]) => ({name, value}));
    const keys = rows.map((row, at) => key(`${row.name} ${number(row.value)}`, SERIES[at % SERIES.length], "box"));
    return figure(`Reward ${number(rewards.total)}`, keys, (width) => Plot.plot({
      width, height: 52, marginLeft: 62, marginRight: 92, marginTop: 4, marginBottom: 24,
      color: {domain: rows.map((row) => row.name), range: SERIES}, x: {label: null, ticks: 6, tickSize: 0, zero: true},
      marks: [Plot.barX(rows, Plot.stackX({x: "value", fill: "name", order: rows.map((row) => row.name), insetLeft: 0.5, insetRight: 0.5, rx: 1})), Plot.ruleX([0], {stroke: "var(--faint)"})],
    }), {wide: true});
  }

  Object.assign(paravt, {SERIES, figure, key, curves, areas, heat, intervals, timeline, rewardBar});
})();
