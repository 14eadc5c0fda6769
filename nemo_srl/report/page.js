"use strict";
// The browser of candidates. Text of models is untrusted, so it only ever becomes text nodes.
(function () {
  const island = document.getElementById("data");
  const viewport = document.getElementById("viewport");
  if (!viewport) return;
  // `names` is there when the page compares models. SAMPLE is then an index into it.
  const { prompts, candidates, names } = JSON.parse(island.textContent);
  const [PROMPT, SAMPLE, RESPONSE, TOKENS, CUT, SCORE, ROLE, VERDICTS] = [0, 1, 2, 3, 4, 5, 6, 7];
  const ROLES = ["", "chosen", "rejected"]; // also the names of their CSS classes
  const RESULTS = names ? ["", "won", "lost"] : ROLES;
  const WINNERS = new Map([[null, "no winner in this verdict"], [0, "prefers the other answer"], [0.5, "a tie"], [1, "prefers this answer"]]);
  const ROW_HEIGHT = 34; // pixels, as in page.css
  const MARGIN = 8; // rows that are drawn above and below the visible ones

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const by = (id) => document.getElementById(id);

  // The highest score of a candidate minus its lowest; null when it has fewer than two scores.
  const spread = (c) => {
    const scores = c[VERDICTS].map((v) => v[0]).filter((s) => s !== null);
    return scores.length < 2 ? null : Math.max(...scores) - Math.min(...scores);
  };
  const spreads = candidates.map(spread);
  const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));

  const COLUMNS = [
    names
      ? { label: "model", value: (i) => candidates[i][SAMPLE], show: (i) => names[candidates[i][SAMPLE]] }
      : { label: "iteration", value: (i) => prompts[candidates[i][PROMPT]][0], show: (i) => String(prompts[candidates[i][PROMPT]][0]) },
    { label: "prompt", value: (i) => prompts[candidates[i][PROMPT]][2], show: (i) => prompts[candidates[i][PROMPT]][2] },
    { label: "score", value: (i) => candidates[i][SCORE], show: (i) => number(candidates[i][SCORE], 2) },
    { label: "spread", value: (i) => spreads[i], show: (i) => number(spreads[i], 1) },
    { label: "tokens", value: (i) => candidates[i][TOKENS], show: (i) => String(candidates[i][TOKENS]) },
    { label: names ? "result" : "pair", value: (i) => RESULTS[candidates[i][ROLE]], show: (i) => RESULTS[candidates[i][ROLE]] },
  ];
  const KINDS = {
    all: () => true,
    paired: (c) => c[ROLE] !== 0,
    chosen: (c) => c[ROLE] === 1,
    rejected: (c) => c[ROLE] === 2,
    unpaired: (c) => c[ROLE] === 0,
    tied: (c) => c[SCORE] !== null && c[ROLE] === 0,
    disagreed: (c) => spread(c) > 0,
    unscored: (c) => c[SCORE] === null,
    invalid: (c) => c[VERDICTS].some((v) => v[0] === null),
    cut: (c) => c[CUT] === 1,
  };

  let shown = candidates.map((_, i) => i);
  let sort = null; // {column, descending}
  let current = -1; // index of a candidate
  let query = "";
  let haystacks = null;

  const haystack = (i) => {
    if (!haystacks) {
      haystacks = candidates.map((c) =>
        [prompts[c[PROMPT]][2], c[RESPONSE], ...c[VERDICTS].map((v) => v[1])].join("\n").toLowerCase());
    }
    return haystacks[i];
  };

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
    shown = [];
    candidates.forEach((c, i) => {
      if (!keep(c)) return;
      if (iteration !== "all" && prompts[c[PROMPT]][0] !== Number(iteration)) return;
      if (query && !haystack(i).includes(query)) return;
      shown.push(i);
    });
    if (sort) {
      const value = COLUMNS[sort.column].value;
      shown.sort((a, b) => compare(value(a), value(b)) || a - b);
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
      const row = element("div", "row");
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", String(i === current));
      row.dataset.candidate = String(i);
      for (const column of COLUMNS) {
        row.append(element("span", column === COLUMNS.at(-1) ? ROLES[candidates[i][ROLE]] : "", column.show(i).slice(0, 200)));
      }
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
    const card = element("div", i === current ? "candidate current" : "candidate");
    const tags = element("div", "tags");
    tags.append(element("span", "", names ? names[c[SAMPLE]] : `answer ${c[SAMPLE]}`));
    const score = element("span", "", "score ");
    score.append(element("b", "", number(c[SCORE], 2)));
    tags.append(score, element("span", "", `${c[TOKENS]} tokens${c[CUT] ? ", cut off" : ""}`));
    if (c[ROLE]) tags.append(element("span", ROLES[c[ROLE]], RESULTS[c[ROLE]]));
    card.append(tags, marked("text", c[RESPONSE]));
    for (const [points, verdict] of c[VERDICTS]) {
      const block = element("div", "verdict");
      const read = points === null ? "no score in this verdict" : `read as ${points}`;
      block.append(element("span", "soft", names ? WINNERS.get(points) : read));
      block.append(marked("text", verdict));
      card.append(block);
    }
    return card;
  }

  function select(i) {
    current = i;
    const index = candidates[i][PROMPT];
    const [iteration, id, text] = prompts[index];
    const siblings = [];
    let k = i;
    while (k > 0 && candidates[k - 1][PROMPT] === index) k -= 1;
    for (; k < candidates.length && candidates[k][PROMPT] === index; k += 1) siblings.push(k);
    by("detail").replaceChildren(
      element("div", "soft", names ? `question ${id}` : `iteration ${iteration}, prompt ${id}`), marked("text prompt", text), ...siblings.map(candidateCard));
    const detail = by("detail");
    const top = detail.querySelector(".current").offsetTop - detail.offsetTop;
    detail.scrollTop = top > detail.clientHeight / 2 ? top - 40 : 0; // keeps the prompt visible, if there is room
    drawRows();
  }

  function step(distance) {
    if (!shown.length) return;
    const at = shown.indexOf(current);
    const next = Math.min(shown.length - 1, Math.max(0, at < 0 ? 0 : at + distance));
    const top = next * ROW_HEIGHT;
    if (top < viewport.scrollTop) viewport.scrollTop = top;
    if (top + ROW_HEIGHT > viewport.scrollTop + viewport.clientHeight) viewport.scrollTop = top + ROW_HEIGHT - viewport.clientHeight;
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
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    step(steps[event.key]);
  });
  update();
  if (shown.length) select(shown[0]);
})();
