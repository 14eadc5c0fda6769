"use strict";
// The browser of candidates. Text of models is untrusted, so it only ever becomes text nodes.
(function () {
  const island = document.getElementById("data");
  const viewport = document.getElementById("viewport");
  if (!viewport) return;
  // `names` is there when the page compares models. `sample` is then an index into it.
  const { prompts, candidates: packed, names } = JSON.parse(island.textContent);
  const candidates = packed.map(([prompt, sample, response, tokens, cut, score, role, verdicts]) => {
    const scores = verdicts.map((v) => v[0]).filter((s) => s !== null);
    const spread = scores.length < 2 ? null : Math.max(...scores) - Math.min(...scores);
    const [iteration, id, text] = prompts[prompt];
    return { prompt, iteration, id, text, sample, response, tokens, cut, score, role, verdicts, spread };
  });
  const ROLES = ["", "chosen", "rejected"]; // also the names of their CSS classes
  const RESULTS = names ? ["", "won", "lost"] : ROLES;
  const WINNERS = new Map([[null, "no winner in this verdict"], [0, "prefers the other answer"], [0.5, "a tie"], [1, "prefers this answer"]]);
  const ROW_HEIGHT = 34; // pixels, as in page.css
  const MARGIN = 8; // rows that are drawn above and below the visible ones

  const element = (name, className, ...content) => {
    const made = document.createElement(name);
    made.className = className;
    made.append(...content); // texts become text nodes
    return made;
  };
  const by = (id) => document.getElementById(id);
  const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));

  // Label, the value to sort by, and the text to show where that is another one.
  const COLUMNS = [
    names ? ["model", (c) => c.sample, (c) => names[c.sample]] : ["iteration", (c) => c.iteration],
    ["prompt", (c) => c.text],
    ["score", (c) => c.score, (c) => number(c.score, 2)],
    ["spread", (c) => c.spread, (c) => number(c.spread, 1)],
    ["tokens", (c) => c.tokens],
    [names ? "result" : "pair", (c) => RESULTS[c.role]],
  ].map(([label, value, show = value]) => ({ label, value, show }));
  const KINDS = {
    all: () => true,
    paired: (c) => c.role !== 0,
    chosen: (c) => c.role === 1,
    rejected: (c) => c.role === 2,
    unpaired: (c) => c.role === 0,
    tied: (c) => c.score !== null && c.role === 0,
    disagreed: (c) => c.spread > 0,
    unscored: (c) => c.score === null,
    invalid: (c) => c.verdicts.some((v) => v[0] === null),
    cut: (c) => c.cut === 1,
  };

  let shown = [...candidates.keys()];
  let sort = null; // {column, descending}
  let current = -1; // index of a candidate
  let query = "";

  // What the search looks in. It is made when it is first needed.
  const haystack = (c) => (c.haystack ??= [c.text, c.response, ...c.verdicts.map((v) => v[1])].join("\n").toLowerCase());

  const compare = (a, b) => {
    if (a === b) return 0;
    if (a === null || a === "") return 1; // missing values come last in both directions
    if (b === null || b === "") return -1;
    const order = a < b ? -1 : 1;
    return sort.descending ? -order : order;
  };

  function update() {
    const keep = KINDS[by("kind").value];
    const iteration = by("iteration").value;
    shown = [...candidates.keys()].filter((i) => {
      const c = candidates[i];
      return keep(c) && (iteration === "all" || c.iteration === Number(iteration)) && (!query || haystack(c).includes(query));
    });
    if (sort) {
      const value = COLUMNS[sort.column].value;
      shown.sort((a, b) => compare(value(candidates[a]), value(candidates[b])) || a - b);
    }
    by("count").textContent = `${shown.length} of ${candidates.length}`;
    by("spacer").style.height = `${shown.length * ROW_HEIGHT}px`;
    viewport.scrollTop = 0;
    drawHead();
    drawRows();
  }

  function drawHead() {
    by("head").replaceChildren(...COLUMNS.map((column, n) => {
      const active = sort && sort.column === n;
      const button = element("button", "", column.label + (active ? (sort.descending ? " ↓" : " ↑") : ""));
      button.setAttribute("aria-pressed", String(Boolean(active)));
      button.dataset.column = column.label;
      button.addEventListener("click", () => {
        sort = active ? (sort.descending ? null : { column: n, descending: true }) : { column: n, descending: false };
        update();
      });
      return button;
    }));
  }

  function drawRows() {
    const first = Math.max(0, Math.floor(viewport.scrollTop / ROW_HEIGHT) - MARGIN);
    const last = Math.min(shown.length, Math.ceil((viewport.scrollTop + viewport.clientHeight) / ROW_HEIGHT) + MARGIN);
    const rows = by("rows");
    rows.style.transform = `translateY(${first * ROW_HEIGHT}px)`;
    rows.replaceChildren(...shown.slice(first, last).map((i) => {
      const c = candidates[i];
      const row = element("div", "row", ...COLUMNS.map((column) =>
        element("span", column === COLUMNS.at(-1) ? ROLES[c.role] : "", String(column.show(c)).slice(0, 200))));
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", String(i === current));
      row.dataset.candidate = String(i);
      return row;
    }));
  }

  // A block with the text, in which every match of the search is marked.
  function marked(className, text) {
    const block = element("div", className);
    const lower = text.toLowerCase();
    let from = 0;
    // The lower case of some letters is longer, which shifts the positions. Then nothing is marked.
    while (query && lower.length === text.length) {
      const at = lower.indexOf(query, from);
      if (at < 0) break;
      block.append(text.slice(from, at), element("mark", "", text.slice(at, at + query.length)));
      from = at + query.length;
    }
    block.append(text.slice(from));
    return block;
  }

  function candidateCard(i) {
    const c = candidates[i];
    const tags = element("div", "tags",
      element("span", "", names ? names[c.sample] : `answer ${c.sample}`),
      element("span", "", "score ", element("b", "", number(c.score, 2))),
      element("span", "", `${c.tokens} tokens${c.cut ? ", cut off" : ""}`),
      ...(c.role ? [element("span", ROLES[c.role], RESULTS[c.role])] : []));
    const verdicts = c.verdicts.map(([points, verdict]) => {
      const read = points === null ? "no score in this verdict" : `read as ${+points.toFixed(2)}`;
      return element("div", "verdict", element("span", "soft", names ? WINNERS.get(points) : read), marked("text", verdict));
    });
    return element("div", i === current ? "candidate current" : "candidate", tags, marked("text", c.response), ...verdicts);
  }

  function select(i) {
    current = i;
    const { prompt, iteration, id, text } = candidates[i];
    const siblings = [...candidates.keys()].filter((k) => candidates[k].prompt === prompt);
    const detail = by("detail");
    detail.replaceChildren(
      element("div", "soft", names ? `question ${id}` : `iteration ${iteration}, prompt ${id}`), marked("text prompt", text), ...siblings.map(candidateCard));
    const top = detail.querySelector(".current").offsetTop - detail.offsetTop;
    detail.scrollTop = top > detail.clientHeight / 2 ? top - 40 : 0; // keeps the prompt visible, if there is room
    drawRows();
  }

  function step(distance) {
    if (!shown.length) return;
    const at = shown.indexOf(current);
    const next = Math.min(shown.length - 1, Math.max(0, at < 0 ? 0 : at + distance));
    const lowest = next * ROW_HEIGHT; // the row is visible from `highest` to `lowest`
    const highest = lowest + ROW_HEIGHT - viewport.clientHeight;
    viewport.scrollTop = Math.min(lowest, Math.max(highest, viewport.scrollTop));
    select(shown[next]);
  }

  const iterations = [...new Set(prompts.map((p) => p[0]))];
  by("iteration").hidden = iterations.length < 2;
  by("iteration").append(new Option("all iterations", "all"), ...iterations.map((t) => new Option(`iteration ${t}`, String(t))));
  by("iteration").addEventListener("change", update);
  by("kind").addEventListener("change", update);
  let timer = 0;
  by("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { query = by("search").value.toLowerCase(); update(); if (current >= 0) select(current); }, 120);
  });
  viewport.addEventListener("scroll", drawRows, { passive: true });
  window.addEventListener("resize", drawRows);
  by("rows").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) select(Number(row.dataset.candidate));
  });
  viewport.addEventListener("keydown", (event) => {
    const distance = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15 }[event.key];
    if (!distance) return;
    event.preventDefault();
    step(distance);
  });
  update();
  if (shown.length) select(shown[0]);
})();
