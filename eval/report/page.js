// The browser of trajectories and the curves. Everything that a model or a data set wrote is put in with textContent.
"use strict";
(() => {
  const PAGE_ROWS = 50;
  const MANY_SEGMENTS = 3;
  const data = JSON.parse(document.getElementById("data").textContent);
  const player = document.getElementById("player");
  const byId = (id) => document.getElementById(id);

  /** An element: attributes (an "on..." function is a listener), then children. Text stays text. */
  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value === true) element.setAttribute(key, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return element;
  }

  function draw(name, attributes = {}, text = null) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    return element;
  }

  const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const number = (value) => String(Number(value.toFixed(3)) + 0).replace("-", "−");
  const seconds = (value) => (value === null ? "?" : value.toFixed(2));

  // ------------------------------------------------------------------------------------------------ rows

  /** The rows of a set, joined by key: [row of run A or null, row of run B or null]. */
  function join(sides) {
    if (sides.length === 1) return (sides[0] || []).map((row) => [row]);
    const second = new Map((sides[1] || []).map((row) => [row.key, row]));
    const joined = (sides[0] || []).map((row) => [row, second.get(row.key) || null]);
    const first = new Set((sides[0] || []).map((row) => row.key));
    return joined.concat((sides[1] || []).filter((row) => !first.has(row.key)).map((row) => [null, row]));
  }

  const sets = data.sets.map((set) => ({ name: set.name, entries: join(set.sides).map((sides) => ({ sides })) }));
  const two = data.runs.length > 1;
  const one = (entry) => entry.sides[0] || entry.sides[1];
  const some = (test) => (entry) => entry.sides.some((row) => row && test(row));
  const wrong = (row) => row.verdict !== "right" && row.verdict !== "unscored";
  const right = (row) => row.verdict === "right";
  const verdictFilters = [
    ["all", "All", () => true],
    ["right", two ? "A right" : "Right", (entry) => entry.sides[0] && right(entry.sides[0])],
    ["wrong", two ? "A wrong" : "Wrong", (entry) => entry.sides[0] && wrong(entry.sides[0])],
    ...(two ? [
      ["gained", "A wrong, B right", ({ sides: [a, b] }) => a && b && wrong(a) && right(b)],
      ["lost", "A right, B wrong", ({ sides: [a, b] }) => a && b && right(a) && wrong(b)],
    ] : []),
    ["unanswered", "No answer", some((row) => row.verdict === "unanswered" || row.verdict === "failed")],
  ];
  const traitFilters = [
    ["refused", "Refused a segment", some((row) => row.segments.some((segment) => segment.refusal))],
    ["many", `${MANY_SEGMENTS} or more segments`, some((row) => row.segments.length >= MANY_SEGMENTS)],
    ["deaf", "Heard nothing again", some((row) => !row.segments.some((segment) => segment.inserted))],
  ];

  const state = { set: 0, verdict: "all", traits: new Set(), labels: {}, words: [], place: 0, found: [] };

  function haystack(entry) {
    if (entry.text === undefined) {
      const said = (row) => row.parts.map((part) => (typeof part === "number" ? row.segments[part].text : part)).join("");
      entry.text = entry.sides.filter(Boolean).map((row) => [
        row.id, row.question, ...row.choices, row.answer, row.prediction, said(row), row.notes.error || "",
        ...Object.values(row.labels).flat(), ...row.events.map((event) => event.label),
      ].join("\n")).join("\n").toLowerCase();
    }
    return entry.text;
  }

  function matches(entry, verdict, traits) {
    const test = verdictFilters.find(([name]) => name === verdict)[2];
    return test(entry)
      && traitFilters.every(([name, , trait]) => !traits.has(name) || trait(entry))
      && Object.entries(state.labels).every(([field, label]) => !label || (one(entry).labels[field] || []).includes(label))
      && state.words.every((word) => haystack(entry).includes(word));
  }

  /** Find the rows anew; stay at the one that is shown where it is still among them. */
  function refresh() {
    const shown = state.found[state.place];
    state.found = sets[state.set].entries.filter((entry) => matches(entry, state.verdict, state.traits));
    state.place = Math.max(0, state.found.indexOf(shown));
    showTools();
    showRows();
    showDetail();
  }

  function showTools() {
    const entries = sets[state.set].entries;
    byId("listen").querySelector(".tabs").replaceChildren(...(sets.length < 2 ? [] : sets.map((set, place) => make(
      "button", { type: "button", "aria-pressed": String(place === state.set), onclick: () => openSet(place) }, set.name))));
    const chip = (name, title, pressed, count, onclick) => make(
      "button", { type: "button", "data-filter": name, "aria-pressed": String(pressed), onclick }, title, make("small", {}, count.toLocaleString("en")));
    byId("listen").querySelector(".chips").replaceChildren(
      ...verdictFilters.map(([name, title]) => chip(name, title, state.verdict === name,
        entries.filter((entry) => matches(entry, name, state.traits)).length,
        () => { state.verdict = name; refresh(); })),
      make("i"),
      ...traitFilters.map(([name, title]) => chip(name, title, state.traits.has(name),
        entries.filter((entry) => matches(entry, state.verdict, new Set([...state.traits, name]))).length,
        () => { state.traits.has(name) ? state.traits.delete(name) : state.traits.add(name); refresh(); })));
  }

  function showSelects() {
    const counts = {};
    for (const entry of sets[state.set].entries) {
      for (const [field, labels] of Object.entries(one(entry).labels)) {
        for (const label of labels) {
          counts[field] = counts[field] || new Map();
          counts[field].set(label, (counts[field].get(label) || 0) + 1);
        }
      }
    }
    const order = (a, b) => a.localeCompare(b, "en", { numeric: true });
    byId("listen").querySelector(".selects").replaceChildren(...Object.entries(counts).filter(([, labels]) => labels.size > 1).map(([field, labels]) => make(
      "select", { "aria-label": field, "data-field": field, onchange: (event) => { state.labels[field] = event.target.value; refresh(); } },
      make("option", { value: "" }, `every ${field}`),
      ...[...labels.keys()].sort(order).map((label) => make("option", { value: label }, `${label} (${labels.get(label)})`)))));
  }

  function openSet(place) {
    Object.assign(state, { set: place, labels: {}, place: 0, found: [] });
    showSelects();
    refresh();
  }

  const SIGNS = { right: "✓", wrong: "✕", failed: "!", unanswered: "–", unscored: "?" };
  const SAID = { right: "Right", wrong: "Wrong", failed: "Failed", unanswered: "No answer", unscored: "Not scored" };

  const sign = (row) => (row
    ? make("span", { class: `sign ${row.verdict}`, title: SAID[row.verdict], "aria-label": SAID[row.verdict], role: "img" }, SIGNS[row.verdict])
    : make("span", { class: "sign absent", "aria-label": "not in this run", role: "img" }, "·"));

  function showRows() {
    const page = Math.floor(state.place / PAGE_ROWS);
    const first = page * PAGE_ROWS;
    const rows = state.found.slice(first, first + PAGE_ROWS);
    byId("found").textContent = state.found.length
      ? `${first + 1}–${first + rows.length} of ${state.found.length.toLocaleString("en")}` : "nothing found";
    byId("page-back").disabled = page === 0;
    byId("page-on").disabled = first + PAGE_ROWS >= state.found.length;
    byId("rows").replaceChildren(...rows.map((entry, offset) => {
      const row = one(entry);
      return make("li", {}, make(
        "button", { type: "button", "data-key": row.key, "aria-current": first + offset === state.place ? "true" : null, onclick: () => go(first + offset) },
        make("span", { class: "signs" }, ...entry.sides.map(sign)),
        make("span", { class: "q" }, row.question.trim() || "(no question)"),
        make("span", { class: "sub" }, make("span", {}, row.id), row.terms.score === undefined ? "" : make("span", {}, number(row.terms.score)), make(
          "span", { class: "bars", title: `${row.segments.length} segments` },
          ...row.segments.slice(0, 10).map((segment) => make("b", { class: segment.refusal ? "no" : null }))))));
    }));
  }

  function go(place) {
    if (place < 0 || place >= state.found.length) return;
    const samePage = Math.floor(place / PAGE_ROWS) === Math.floor(state.place / PAGE_ROWS);
    const buttons = byId("rows").querySelectorAll("button");
    if (samePage && buttons.length) buttons[state.place % PAGE_ROWS].removeAttribute("aria-current");
    state.place = place;
    if (!samePage) showRows();
    const button = byId("rows").querySelectorAll("button")[place % PAGE_ROWS];
    button.setAttribute("aria-current", "true");
    // Only the list scrolls: the page stays where the reader has it.
    const list = byId("rows");
    if (button.offsetTop < list.scrollTop + list.offsetTop) list.scrollTop = button.offsetTop - list.offsetTop;
    const below = button.offsetTop + button.offsetHeight - list.offsetTop - list.clientHeight;
    if (below > list.scrollTop) list.scrollTop = below;
    showDetail();
  }

  function turnPage(by) {
    go((Math.floor(state.place / PAGE_ROWS) + by) * PAGE_ROWS);
    byId("rows").scrollTop = 0;
  }

  // ------------------------------------------------------------------------------------------------ sound

  const playing = { sound: null, end: null, button: null, frame: 0 };
  const urls = new Map();

  function source(place) {
    if (!data.sounds[place].embedded) return data.sounds[place].href;
    if (!urls.has(place)) {
      const blob = new Blob([bytesOf(byId(`sound-${place}`).textContent)], { type: "audio/flac" });
      urls.set(place, URL.createObjectURL(blob));
    }
    return urls.get(place);
  }

  function mark(button, on) {
    if (!button) return;
    button.classList.toggle("on", on);
    document.querySelectorAll(`[data-band="${button.dataset.plays}"]`).forEach((band) => band.classList.toggle("on", on));
  }

  function stop() {
    player.pause();
    mark(playing.button, false);
    playing.button = null;
  }

  /** Play [start, end) of a sound, to its end where `end` is null. The same button again pauses. */
  async function play(place, start, end, button) {
    if (playing.button === button && !player.paused) return stop();
    stop();
    Object.assign(playing, { sound: place, end, button });
    mark(button, true);
    try {
      if (player.dataset.sound !== String(place)) {
        player.dataset.sound = String(place);
        player.src = source(place);
      }
      if (player.readyState < 1) {
        player.load();
        await new Promise((resolve, reject) => {
          player.addEventListener("loadedmetadata", resolve, { once: true });
          player.addEventListener("error", () => reject(player.error), { once: true });
        });
      }
      if (playing.button !== button) return;
      player.currentTime = start;
      await player.play();
      cancelAnimationFrame(playing.frame);
      follow();
    } catch (error) {
      if (error && error.name === "AbortError") return; // another clip was asked for meanwhile
      mark(button, false);
      delete player.dataset.sound;
      byId("detail").querySelectorAll(`.problem[data-sound="${place}"]`).forEach((line) => {
        line.hidden = false;
        line.textContent = `This browser cannot play ${decodeURI(data.sounds[place].href)}`;
      });
    }
  }

  function follow() {
    if (playing.end !== null && player.currentTime >= playing.end) stop();
    else if (player.ended) stop();
    showTime();
    if (!player.paused) playing.frame = requestAnimationFrame(follow);
  }
  player.addEventListener("timeupdate", () => {
    // A tab in the background gets no frames.
    if (playing.end !== null && player.currentTime >= playing.end) stop();
  });

  function showTime() {
    document.querySelectorAll(`.sound[data-sound="${playing.sound}"]`).forEach((scene) => {
      const length = Number(scene.dataset.seconds);
      const line = scene.querySelector(".head-line");
      line.hidden = false;
      line.style.left = `${Math.min(100, (100 * player.currentTime) / length)}%`;
      scene.querySelector(".time").textContent = `${player.currentTime.toFixed(1)} of ${length.toFixed(1)} s`;
    });
  }

  // ------------------------------------------------------------------------------------------------ detail

  let drawn = [];
  const resized = new ResizeObserver(() => drawn.forEach(([canvas, peaks]) => drawWave(canvas, peaks)));

  function drawWave(canvas, peaks) {
    const scale = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--wave");
    const columns = Math.floor(width / 3);
    for (let column = 0; column < columns; column += 1) {
      const from = Math.floor((column * peaks.length) / columns);
      const to = Math.max(from + 1, Math.floor(((column + 1) * peaks.length) / columns));
      const loudest = Math.max(...peaks.subarray(from, to)) / 255;
      const bar = Math.max(1.5, loudest * (height - 8));
      pen.beginPath();
      pen.roundRect(column * 3 + 0.5, (height - bar) / 2, 2, bar, 1);
      pen.fill();
    }
  }

  /** Lay stretches out in as few lines as they need without overlapping: the line of each. */
  function stack(stretches) {
    const ends = [];
    return stretches.map(({ start, end }) => {
      let line = ends.findIndex((reached) => reached <= start + 1e-6);
      if (line < 0) line = ends.push(0) - 1;
      ends[line] = end;
      return line;
    });
  }

  function ticks(length) {
    const step = [0.25, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600].find((size) => length / size <= 7) || 1800;
    const found = [];
    for (let at = 0; at < length - step * 0.4; at += step) found.push(at);
    return [...found, length];
  }

  /** A button that plays a segment, or says why there is nothing to play. */
  function segmentButton(row, side, place, brief) {
    const segment = row.segments[place];
    const sound = data.sounds[row.sound];
    const range = segment.start === null ? segment.text.replace(/<\/?seg>/g, "").trim().slice(0, 48) : `${seconds(segment.start)}–${seconds(segment.end)} s`;
    const fate = segment.refusal || (segment.inserted === false && !brief ? "named only" : "");
    const label = [range, fate].filter(Boolean).join(" · ");
    const cut = segment.start === null ? null : [segment.start, Math.min(segment.end, sound && !sound.problem ? sound.seconds : segment.end)];
    const playable = Boolean(sound && !sound.problem && cut && cut[0] < cut[1]);
    const look = segment.refusal ? "no" : segment.inserted === false ? "named" : "";
    return make("button", {
      type: "button", class: `play c${place % 8} ${look}`, disabled: !playable, "data-plays": `${side}-${place}`,
      title: segment.refusal ? `refused: ${segment.refusal}` : segment.inserted === false ? "named, but not inserted" : "heard again",
      onclick: (event) => playable && play(row.sound, cut[0], cut[1], event.currentTarget),
    }, brief ? label : `${place + 1}   ${label}`);
  }

  function soundPart(row, side) {
    const sound = row.sound === null ? null : data.sounds[row.sound];
    const usable = Boolean(sound && !sound.problem);
    const ends = [...row.segments, ...row.events].map((stretch) => stretch.end || 0);
    const length = usable ? sound.seconds : row.duration || Math.max(0.001, ...ends);
    const part = make("div", { class: "sound", "data-sound": row.sound, "data-seconds": length });
    const left = (at) => `${Math.min(100, (100 * at) / length)}%`;
    const place = (element, start, end) => {
      element.style.left = left(Math.min(start, length * 0.985));
      element.style.width = `${Math.max(0.4, (100 * (Math.min(end, length) - start)) / length)}%`;
      return element;
    };
    const timed = row.segments.map((segment, number) => ({ ...segment, number }))
      .filter((segment) => segment.start !== null && segment.end !== null && segment.start < segment.end);
    const look = (segment) => `${segment.refusal ? "no" : segment.inserted === false ? "named" : ""} c${segment.number % 8}`;

    const lines = stack(timed.map((segment) => ({ start: segment.start, end: Math.max(segment.end, segment.start + length * 0.03) })));
    const lanes = make("div", { class: "lanes", "aria-hidden": "true" }, ...timed.map((segment, index) => {
      const tag = make("button", {
        type: "button", tabindex: "-1", class: `tag ${look(segment)}`, title: segment.refusal || "play",
        onclick: () => part.querySelector(`.transport [data-plays="${side}-${segment.number}"]`).click(),
      }, String(segment.number + 1));
      tag.style.top = `${lines[index] * 22}px`;
      return place(tag, segment.start, segment.end);
    }));
    lanes.style.height = timed.length ? `${(Math.max(...lines) + 1) * 22 - 3}px` : "0";

    const canvas = make("canvas", { role: "img", "aria-label": `Waveform, ${length.toFixed(1)} seconds, ${row.segments.length} segments` });
    const scene = make("div", { class: "scene" }, canvas);
    if (usable && sound.embedded) scene.append(make("img", { src: `data:image/png;base64,${byId(`mel-${row.sound}`).textContent}`, alt: "Log-mel spectrogram" }));
    scene.append(...timed.map((segment) => place(make("span", { class: `band ${look(segment)}`, "data-band": `${side}-${segment.number}` }), segment.start, segment.end)));
    scene.append(make("span", { class: "head-line", hidden: true }));
    if (usable) drawn.push([canvas, bytesOf(sound.peaks)]);

    const eventLines = stack(row.events);
    const events = make("div", { class: "events" }, ...row.events.map((event, index) => {
      const label = make("span", { title: `${event.label}, ${seconds(event.start)}–${seconds(event.end)} s: labelled in the data` }, event.label);
      label.style.top = `${eventLines[index] * 20}px`;
      return place(label, event.start, event.end);
    }));
    events.style.height = row.events.length ? `${(Math.max(...eventLines) + 1) * 20}px` : "0";
    events.hidden = !row.events.length;

    const axis = make("div", { class: "axis", "aria-hidden": "true" }, ...ticks(length).map((at, index, all) => {
      const text = make("span", {}, index === all.length - 1 ? `${Number(at.toFixed(2))} s` : String(at));
      text.style.left = left(at);
      return text;
    }));
    const whole = make("button", {
      type: "button", class: "play whole", disabled: !usable, "data-plays": `${side}-whole`,
      onclick: (event) => play(row.sound, 0, null, event.currentTarget),
    }, "Whole");
    scene.addEventListener("click", (event) => {
      if (!usable) return;
      const box = scene.getBoundingClientRect();
      stop();
      play(row.sound, (length * (event.clientX - box.left)) / box.width, null, whole);
    });
    const problem = !usable ? (sound ? sound.problem : row.audio_problem) : "";
    part.append(lanes, scene, events, axis, make("div", { class: "transport" }, whole,
      make("span", { class: "time" }, `${length.toFixed(1)} s`),
      ...row.segments.map((_, number) => segmentButton(row, side, number, false))),
    make("p", { class: "problem", "data-sound": row.sound, hidden: !problem }, problem ? `No sound: ${problem}` : ""));
    return part;
  }

  /** The response, tags of its grammar set small, and each segment as the button that plays it. */
  function words(row, side) {
    if (!row.parts.length) return make("p", { class: "words empty" }, "It said nothing.");
    const pieces = row.parts.flatMap((part) => (typeof part === "number"
      ? [segmentButton(row, side, part, true)]
      : part.split(/(<\/?(?:think|answer)>)/).map((text, place) => (place % 2 ? make("span", { class: "grammar" }, text) : text))));
    return make("p", { class: "words" }, ...pieces);
  }

  function list(pairs) {
    return pairs.length ? make("dl", { class: "terms" }, ...pairs.map(([name, value, look]) => make(
      "div", { class: look }, make("dt", {}, name), make("dd", { class: /^[-−]/.test(value) && look !== "note" ? "minus" : null }, value)))) : null;
  }

  function sidePart(row, side) {
    const name = two ? make("p", { class: `run run-${side}` }, data.runs[side]) : null;
    if (!row) return make("div", { class: "side" }, name, make("p", { class: "absent" }, "This run has no such row."));
    const differs = row.strict !== null && row.strict !== (row.verdict === "right") && row.verdict !== "unanswered";
    const verdict = make("p", { class: "verdict" },
      make("b", { class: `${row.verdict}-text` }, sign(row), SAID[row.verdict]),
      row.prediction ? make("span", {}, `it answered “${row.prediction}”${row.answer && row.verdict !== "right" ? "," : ""}`) : "",
      row.answer && row.verdict !== "right" ? make("span", {}, `the answer is “${row.answer}”`) : "",
      differs ? make("span", {}, row.strict ? "(right by the strict rule)" : "(wrong by the strict rule)") : "");
    const { score, ...terms } = row.terms;
    return make("div", { class: "side", "data-verdict": row.verdict }, name, verdict, soundPart(row, side), words(row, side),
      list([...(score === undefined ? [] : [["reward", number(score), "total"]]), ...Object.entries(terms).map(([term, value]) => [term, number(value), "term"])]),
      list([...Object.entries(row.labels).map(([field, labels]) => [field, labels.join(", "), "note"]),
        ...Object.entries(row.notes).filter(([field]) => !(field in row.labels)).map(([field, value]) => [field, value, "note"])]));
  }

  function showDetail() {
    stop();
    resized.disconnect();
    drawn = [];
    const entry = state.found[state.place];
    if (!entry) {
      byId("detail").replaceChildren(make("p", { class: "nothing" }, "No row is like that. Take a filter away, or search for less."));
      return;
    }
    const row = one(entry);
    const choices = row.choices.map((choice) => make("li", { class: choice === row.answer ? "answer" : null }, choice));
    byId("detail").replaceChildren(
      make("div", { class: "head" }, make("span", { class: "id" }, row.id), make("span", { class: "step" },
        `${state.place + 1} of ${state.found.length.toLocaleString("en")}`,
        make("button", { type: "button", "aria-label": "Previous", onclick: () => go(state.place - 1) }, "←"),
        make("button", { type: "button", "aria-label": "Next", onclick: () => go(state.place + 1) }, "→"))),
      make("h3", { class: `question ${row.question.length > 220 ? "long" : ""}` }, row.question.trim() || "(no question)"),
      row.choices.length ? make("ul", { class: "choices", "aria-label": "Choices" }, ...choices) : "",
      make("div", { class: "sides" }, ...entry.sides.map(sidePart)));
    drawn.forEach(([canvas, peaks]) => { drawWave(canvas, peaks); resized.observe(canvas); });
  }

  // ------------------------------------------------------------------------------------------------ curves

  const WIDTH = 240, HEIGHT = 128, EDGE = { left: 44, right: 6, top: 8, bottom: 18 };
  const round = (value) => {
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(size < 0.01 ? 2 : 3)));
  };

  function panel(curves) {
    const given = curves.map((curve, run) => [curve, run]).filter(([curve]) => curve);
    const { title, unit } = given[0][0];
    const all = given.flatMap(([curve]) => [...curve.values, ...curve.validation_values]);
    const steps = given.flatMap(([curve]) => [...curve.steps, ...curve.validation_steps]);
    let low = Math.min(...all), high = Math.max(...all);
    if (high - low < 1e-12) { low -= Math.abs(low) * 0.1 || 0.5; high += Math.abs(high) * 0.1 || 0.5; }
    const first = Math.min(...steps), last = Math.max(...steps, first + 1);
    const x = (step) => EDGE.left + ((step - first) / (last - first)) * (WIDTH - EDGE.left - EDGE.right);
    const y = (value) => HEIGHT - EDGE.bottom - ((value - low) / (high - low)) * (HEIGHT - EDGE.top - EDGE.bottom);
    const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}, ${unit}, from ${round(given[0][0].values[0])} to ${round(given[0][0].values.at(-1))}` });
    for (const value of [low, (low + high) / 2, high]) {
      svg.append(draw("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(value), y2: y(value) }));
      svg.append(draw("text", { x: EDGE.left - 4, y: y(value) + 3.5, "text-anchor": "end" }, round(value)));
    }
    svg.append(draw("text", { x: EDGE.left, y: HEIGHT - 4 }, String(first)), draw("text", { x: WIDTH - EDGE.right, y: HEIGHT - 4, "text-anchor": "end" }, String(last)));
    const line = (curve, values, look) => draw("polyline", { class: look, points: curve.steps.map((step, place) => `${x(step).toFixed(1)},${y(values[place]).toFixed(1)}`).join(" ") });
    for (const [curve, run] of given) {
      svg.append(line(curve, curve.values, `line of-${run} ${curve.smooth.length ? "raw" : ""}`));
      if (curve.smooth.length) svg.append(line(curve, curve.smooth, `line of-${run}`));
      curve.validation_steps.forEach((step, place) => {
        const dot = draw("circle", { class: `dot of-${run}`, r: 3, cx: x(step), cy: y(curve.validation_values[place]) });
        dot.append(draw("title", {}, `validation, step ${step}: ${round(curve.validation_values[place])}`));
        svg.append(dot);
      });
    }
    const hair = draw("line", { class: "hair", y1: EDGE.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
    svg.append(hair);
    const read = make("small", {}, unit);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = first + (((event.clientX - box.left) / box.width) * WIDTH - EDGE.left) / (WIDTH - EDGE.left - EDGE.right) * (last - first);
      const nearest = given[0][0].steps.reduce((best, step) => (Math.abs(step - at) < Math.abs(best - at) ? step : best));
      hair.setAttribute("x1", x(nearest));
      hair.setAttribute("x2", x(nearest));
      hair.setAttribute("visibility", "visible");
      read.textContent = `step ${nearest}: ${given.map(([curve]) => (curve.steps.includes(nearest) ? round(curve.values[curve.steps.indexOf(nearest)]) : "–")).join(" | ")}`;
    });
    svg.addEventListener("pointerleave", () => { hair.setAttribute("visibility", "hidden"); read.textContent = unit; });
    return make("figure", { class: "panel" }, make("figcaption", {}, make("span", {}, title), read), svg);
  }

  function showCurves() {
    const names = [...new Set(data.curves.flatMap((run) => run.map((curve) => curve.name)))];
    if (!names.length) return;
    byId("curves").hidden = byId("to-curves").hidden = false;
    byId("curves").querySelector(".panels").append(...names.map((name) => panel(
      data.curves.map((run) => run.find((curve) => curve.name === name) || null))));
  }

  // ------------------------------------------------------------------------------------------------ keys

  let typing = 0;
  byId("search").addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      refresh();
    }, 120);
  });
  byId("page-back").addEventListener("click", () => turnPage(-1));
  byId("page-on").addEventListener("click", () => turnPage(1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const within = event.target.tagName;
    if (event.key === "Escape" && within === "INPUT") return event.target.blur();
    if (within === "INPUT" || within === "SELECT") return;
    const press = (button) => { if (button && !button.disabled) button.click(); };
    const segment = /^[1-9]$/.test(event.key) && byId("detail").querySelectorAll(`.transport [data-plays="0-${event.key - 1}"]`)[0];
    if (event.key === "j" || event.key === "ArrowRight") go(state.place + 1);
    else if (event.key === "k" || event.key === "ArrowLeft") go(state.place - 1);
    else if (event.key === "/") byId("search").focus();
    else if (event.key === " " && within !== "BUTTON" && within !== "SUMMARY") {
      if (playing.button) stop();
      else press(byId("detail").querySelector(".play.whole"));
    } else if (segment) press(segment);
    else return;
    event.preventDefault();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(([canvas, peaks]) => drawWave(canvas, peaks)));

  showCurves();
  openSet(0);
})();
