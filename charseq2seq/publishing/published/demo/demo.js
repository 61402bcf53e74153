// A page on which a published model writes, and the worker of that page, which runs the model: the page starts this
// file again. The model and its names are those of encoder_decoder_transformer.py.
"use strict";

// ----- arithmetic -----

/** out[row] = row of the matrix times x, an even number of numbers, for the rows from `first` to before `last`. */
function multiply(matrix, x, out, first = 0, last = out.length) {
  const width = x.length;
  let row = first;
  for (; row + 4 <= last; row += 4) { // four rows and two columns at once are fastest
    const at0 = row * width, at1 = at0 + width, at2 = at1 + width, at3 = at2 + width;
    let sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
    for (let i = 0; i < width; i += 2) {
      const x0 = x[i], x1 = x[i + 1];
      sum0 += matrix[at0 + i] * x0 + matrix[at0 + i + 1] * x1;
      sum1 += matrix[at1 + i] * x0 + matrix[at1 + i + 1] * x1;
      sum2 += matrix[at2 + i] * x0 + matrix[at2 + i + 1] * x1;
      sum3 += matrix[at3 + i] * x0 + matrix[at3 + i + 1] * x1;
    }
    out[row] = sum0;
    out[row + 1] = sum1;
    out[row + 2] = sum2;
    out[row + 3] = sum3;
  }
  for (out.fill(0, row, last); row < last; row++) {
    for (let i = 0; i < width; i++) out[row] += matrix[row * width + i] * x[i];
  }
}

/** out += x times a matrix with a row for each entry of x; rows of zeros, of which ReLU leaves most, are skipped. */
function addProduct(matrix, x, out) {
  const width = out.length, rows = [], values = [];
  const use = (row, value) => (rows.push(row * width), values.push(value));
  for (let row = 0; row < x.length; row++) if (x[row] !== 0) use(row, x[row]);
  while (rows.length % 4) use(0, 0);
  for (let k = 0; k < rows.length; k += 4) {
    const at0 = rows[k], at1 = rows[k + 1], at2 = rows[k + 2], at3 = rows[k + 3];
    const x0 = values[k], x1 = values[k + 1], x2 = values[k + 2], x3 = values[k + 3];
    for (let i = 0; i < width; i++) {
      out[i] += matrix[at0 + i] * x0 + matrix[at1 + i] * x1 + matrix[at2 + i] * x2 + matrix[at3 + i] * x3;
    }
  }
}

/** Bring `size` numbers from `first` on to mean 0 and variance 1. */
function normalize(x, first = 0, size = x.length) {
  let mean = 0, squares = 0;
  for (let i = first; i < first + size; i++) mean += x[i] / size;
  for (let i = first; i < first + size; i++) squares += (x[i] - mean) ** 2;
  const scale = 1 / Math.sqrt(squares / size + 1e-5);
  for (let i = first; i < first + size; i++) x[i] = (x[i] - mean) * scale;
  return x;
}

const normalized = (x) => normalize(x.slice());
const transposed = (x, rows) => x.map((_, i) => x[((i % rows) * x.length) / rows + Math.floor(i / rows)]);
const largestOf = (x) => x.reduce((a, b) => Math.max(a, b));
const sumOf = (x) => x.reduce((a, b) => a + b);

/** The token that a random number from 0 to below 1 stands for; as `sample` in Python. */
function sample(logits, random, { temperature, top_p }) {
  const likeliest = logits.indexOf(largestOf(logits));
  if (temperature === 0) return likeliest;
  const weights = Float64Array.from(logits, (logit) => Math.exp((logit - logits[likeliest]) / temperature));
  if (top_p < 1) {
    const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]), enough = top_p * sumOf(weights);
    let kept = 0;
    for (let sum = 0; sum < enough && kept < order.length; kept++) sum += weights[order[kept]];
    for (const token of order.slice(kept)) weights[token] = 0;
  }
  const until = random * sumOf(weights);
  let sum = 0;
  const token = weights.findIndex((weight) => (sum += weight) > until);
  return token < 0 ? likeliest : token;
}

/** How much a token surprises the model, in bits: log2 of 1 / its probability. */
function surprise(logits, token) {
  const largest = largestOf(logits), total = logits.reduce((sum, logit) => sum + Math.exp(logit - largest), 0);
  return (Math.log(total) + largest - logits[token]) / Math.LN2;
}

/** The numbers of torch.rand, so that a seed writes here what it writes there: Mersenne Twister, MT19937. */
function* randomNumbers(seed) {
  const state = new Uint32Array(624).fill(seed % 2 ** 32);
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  for (;;) {
    for (let i = 0; i < 624; i++) {
      const bits = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (bits >>> 1) ^ (bits & 1 ? 0x9908b0df : 0);
    }
    for (let bits of state) {
      bits ^= bits >>> 11;
      bits ^= (bits << 7) & 0x9d2c5680;
      bits ^= (bits << 15) & 0xefc60000;
      bits ^= bits >>> 18;
      yield (bits & 0xffffff) / 2 ** 24;
    }
  }
}

// ----- files -----

/** What is wrong, in a sentence for the visitor. */
class Problem extends Error {}

/** A file as "json" or "arraybuffer"; `report` is told how much of it is there. */
function fetchFile(base, name, type, report = null) {
  return new Promise((resolve, reject) => {
    const request = Object.assign(new XMLHttpRequest(), { onprogress: report });
    request.open("GET", new URL(name, base));
    request.responseType = type;
    request.onloadend = () => {
      const { status, response } = request; // 0: no answer; null: not of the type
      if (status === 200 && response !== null) return resolve(response);
      const missing = `is not there (status ${status}). Put it into one folder with this page and reload.`;
      const fault = status ? missing : "could not be loaded. Check the connection and reload.";
      reject(new Problem(`${name} ${status === 200 ? "is not JSON. Take that of the published model." : fault}`));
    };
    request.send();
  });
}

/** How the numbers of a tensor become float32; the exponents of float16 begin 112 later. */
const widened = (bytes, widen) => new Float32Array(Uint32Array.from(new Uint16Array(bytes), widen).buffer);
const FORMATS = {
  F32: (bytes) => new Float32Array(bytes),
  BF16: (bytes) => widened(bytes, (half) => half << 16),
  F16: (bytes) => widened(bytes, (h) => ((h & 0x8000) << 16) | ((h & 0x7fff) << 13)).map((x) => x * 2 ** 112),
};

/** A function from name and shape to the numbers of a tensor. The file is a length, a JSON header, the numbers. */
function readSafetensors(buffer) {
  const text = (from, to) => new TextDecoder().decode(buffer.slice(from, to));
  const problem = (what) => new Problem(`model.safetensors ${what}`);
  if (text(0, 7) === "version") throw problem("is only a pointer of Git LFS. Run `git lfs pull` in its folder.");
  let header, start;
  try {
    start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
    header = JSON.parse(text(8, start));
  } catch {
    throw problem("is not a safetensors file, or is damaged. Replace it by that of the published model.");
  }
  return (name, ...shape) => {
    const { dtype, shape: found, data_offsets: [from, to] } = header[name] ?? { data_offsets: [] };
    if (String(found) !== String(shape)) {
      const wrong = `${name} is ${found?.join(" x ") ?? "missing"}, not ${shape.join(" x ")}`;
      throw problem(`does not fit config.json: ${wrong}. Take both from one model.`);
    }
    if (!FORMATS[dtype]) throw problem(`is in ${dtype}. This page reads ${Object.keys(FORMATS).join(", ")}.`);
    const bytes = buffer.slice(start + from, start + to);
    const isWhole = bytes.byteLength === shape.reduce((a, b) => a * b, dtype === "F32" ? 4 : 2);
    const numbers = isWhole ? FORMATS[dtype](bytes) : [NaN];
    if (!numbers.every(Number.isFinite)) throw problem(`is cut off or damaged at ${name}. Load it again.`);
    return numbers;
  };
}

// ----- the model -----

// The arguments of `Transformer` that an old config.json lacks.
const DEFAULTS = { num_kv_heads: 1, start_id: 0, bigram: true };
const SIZES = ["vocab_size", "d_model", "num_heads", "num_kv_heads", "d_ff", "num_encoder_layers", "num_decoder_layers",
  "source_length", "target_length"];

/** A layer of encoder or decoder: attention and feed-forward block side by side, on one normalized input. */
class Layer {
  constructor(read, name, size, rotary) {
    const { d_model, num_heads, num_kv_heads, d_ff } = size, headSize = d_model / num_heads;
    const kvSize = headSize * num_kv_heads;
    Object.assign(this, { d_model, num_heads, num_kv_heads, headSize, kvSize, rotary });
    const part = (which, rows, columns) => read(`${name}.${which}.weight`, rows, columns);
    // One matrix reads, with query, key, value and up below one another; one writes, transposed: output and down.
    this.inward = new Float32Array((d_model + 2 * kvSize + d_ff) * d_model);
    this.inward.set(part("attention.query", d_model, d_model));
    this.inward.set(part("attention.key", kvSize, d_model), d_model * d_model);
    this.inward.set(part("attention.value", kvSize, d_model), (d_model + kvSize) * d_model);
    this.inward.set(part("feed_forward.up", d_ff, d_model), (d_model + 2 * kvSize) * d_model);
    this.outward = new Float32Array((d_model + d_ff) * d_model);
    this.outward.set(transposed(part("attention.output", d_model, d_model), d_model));
    this.outward.set(transposed(part("feed_forward.down", d_model, d_ff), d_model), d_model * d_model);
    this.outputs = new Float32Array(d_model + d_ff); // of attention and ReLU: what `outward` reads
    this.weights = new Float32Array(size.source_length + size.target_length); // of attention
  }
  /** Project a position's normalized vector, and cache its key and value; of the encoder's output only these. */
  project(x, position, cache, projected, isMemory = false) {
    const { d_model, headSize, kvSize } = this, values = d_model + kvSize;
    multiply(this.inward, x, projected, isMemory ? d_model : 0, isMemory ? values + kvSize : projected.length);
    for (let at = isMemory ? d_model : 0; at < values; at += headSize) this.rotate(projected, at, position);
    for (let at = 0, head = 0; at < kvSize; at += headSize, head++) {
      cache.keys[head].set(projected.subarray(d_model + at, d_model + at + headSize), position * headSize);
      cache.values[head].set(projected.subarray(values + at, values + at + headSize), position * headSize);
    }
  }
  /** Normalize the head that begins at `first`, and rotate its pairs of features by the position's angles. */
  rotate(x, first, position) {
    const { cos, sin } = this.rotary, half = this.headSize / 2;
    normalize(x, first, this.headSize);
    for (let i = first, at = position * half; i < first + half; i++, at++) {
      const a = x[i], b = x[i + half];
      x[i] = a * cos[at] - b * sin[at];
      x[i + half] = b * cos[at] + a * sin[at];
    }
  }
  /** Add to x what attention to the first `count` positions and the feed-forward block say. */
  finish(projected, count, { keys, values }, x) {
    const { d_model, headSize, outputs } = this, wide = d_model + 2 * this.kvSize;
    const weights = this.weights.subarray(0, count);
    outputs.fill(0, 0, d_model);
    for (let head = 0, at = 0; at < d_model; head++, at += headSize) {
      const shared = Math.floor((head * this.num_kv_heads) / this.num_heads);
      multiply(keys[shared], projected.subarray(at, at + headSize), weights);
      // Products of normalized vectors are bounded, so no maximum is subtracted.
      for (let p = 0; p < count; p++) weights[p] = Math.exp(weights[p] / Math.sqrt(headSize));
      const total = sumOf(weights);
      for (let p = 0; p < count; p++) weights[p] /= total;
      addProduct(values[shared], weights, outputs.subarray(at, at + headSize));
    }
    for (let i = d_model; i < outputs.length; i++) outputs[i] = Math.max(0, projected[wide + i - d_model]) ** 2;
    addProduct(this.outward, outputs, x);
  }
}

class Model {
  constructor(config, read) {
    const size = (this.size = { ...DEFAULTS, ...config }), { d_model, num_heads, vocab_size } = size;
    const half = d_model / num_heads / 2, positions = size.source_length + size.target_length;
    const whole = SIZES.every((name) => Number.isInteger(size[name]) && size[name] > 0);
    if (!whole || half % 1 || num_heads % size.num_kv_heads) {
      throw new Problem("config.json is not that of such a model. Replace it by that of the published model.");
    }
    const angle = (_, i) => Math.floor(i / half) * 10000 ** (-(i % half) / half);
    const angles = Float64Array.from({ length: positions * half }, angle);
    const rotary = { cos: angles.map(Math.cos), sin: angles.map(Math.sin) };
    const layers = (side) => Array.from({ length: size[`num_${side}_layers`] }, (_, i) =>
      new Layer(read, `${side}.${i}`, size, rotary));
    this.embedding = read("embedding.weight", vocab_size, d_model);
    for (let token = 0; token < vocab_size; token++) normalize(this.embedding, token * d_model, d_model);
    this.shares = read("embedding.shares", 4, d_model);
    this.encoder = layers("encoder");
    this.decoder = layers("decoder");
    this.head = read("head.weight", vocab_size, d_model);
    this.bigram = size.bigram ? read("bigram.weight", vocab_size, vocab_size) : null;
    this.projected = new Float32Array(this.decoder[0].inward.length / d_model);
    const buffers = () => [...Array(size.num_kv_heads)].map(() => new Float32Array(positions * 2 * half));
    this.cache = () => ({ keys: buffers(), values: buffers() }); // what a layer's attention keeps of a text
  }
  /** The vector of the last of these tokens: its own and fractions of those of up to three before it. */
  embed(tokens) {
    const { d_model } = this.size, x = new Float32Array(d_model);
    tokens.slice(-4).reverse().forEach((token, back) => {
      const row = token * d_model, share = (3 - back) * d_model;
      for (let i = 0; i < d_model; i++) x[i] += this.embedding[row + i] * this.shares[share + i];
    });
    return normalize(x);
  }
  /** The encoder's output, a vector for each token of the source. */
  encode(source) {
    const xs = source.map((_, position) => this.embed(source.slice(0, position + 1)));
    for (const layer of this.encoder) {
      const cache = this.cache(), projected = xs.map(() => new Float32Array(this.projected.length));
      xs.forEach((x, position) => layer.project(normalized(x), position, cache, projected[position]));
      xs.forEach((x, position) => layer.finish(projected[position], xs.length, cache, x));
    }
    return xs.map(normalized);
  }
}

/** A text. After `target_length` tokens its last `source_length` are the next source, as in `Transformer.stream`. */
class Writer {
  constructor(model, source, seed) {
    Object.assign(this, { model, text: source, random: randomNumbers(seed), written: Infinity });
    this.caches = model.decoder.map(() => model.cache());
  }
  begin() {
    const { model, caches } = this, { source_length, target_length, start_id } = model.size;
    this.text = this.text.slice(-source_length);
    const memory = model.encode(this.text);
    model.decoder.forEach((layer, i) => memory.forEach((x, position) =>
      layer.project(x, position, caches[i], model.projected, true)));
    this.recent = this.text.length ? this.text.slice(-4) : [start_id];
    this.numbers = Array.from({ length: target_length }, () => this.random.next().value);
    this.written = 0;
  }
  /** Logits of the next token. */
  logits() {
    const { model } = this, { vocab_size, start_id, target_length } = model.size;
    if (this.written >= target_length) this.begin();
    const position = this.text.length, x = model.embed(this.recent);
    model.decoder.forEach((layer, i) => {
      layer.project(normalized(x), position, this.caches[i], model.projected);
      layer.finish(model.projected, position + 1, this.caches[i], x);
    });
    const logits = new Float32Array(vocab_size), row = this.recent.at(-1) * vocab_size;
    multiply(model.head, normalized(x), logits);
    if (model.bigram) logits.forEach((logit, i) => (logits[i] = logit + model.bigram[row + i]));
    logits[start_id] = -Infinity;
    return logits;
  }
  /** Write a token, by default a sampled one; returns it and its surprise. */
  next(sampling, given = null) {
    const logits = this.logits(), token = given ?? sample(logits, this.numbers[this.written], sampling);
    this.text.push(token);
    this.recent = [...this.recent.slice(-3), token];
    this.written += 1;
    return [token, surprise(logits, token)];
  }
}

// ----- the worker: the page names a task, and what the worker posts names an answer of the page -----

function startWorker() {
  let model, tokens, writer, isStopped;
  const tell = (answer, facts) => postMessage({ answer, ...facts });
  const readMessages = () => new Promise((done) => {
    const { port1, port2 } = new MessageChannel(); // a timer would wait 4 ms
    port1.onmessage = done;
    port2.postMessage(null);
  });
  const tasks = {
    async load({ base }) {
      const [config, vocab] = await Promise.all(["config", "vocab"].map((it) => fetchFile(base, `${it}.json`, "json")));
      const report = ({ loaded, total }) => tell("loaded", { loaded, total });
      model = new Model(config, readSafetensors(await fetchFile(base, "model.safetensors", "arraybuffer", report)));
      tokens = Object.keys(vocab).sort((a, b) => vocab[a] - vocab[b]);
      if (tokens.length !== config.vocab_size || tokens.some((token, id) => vocab[token] !== id)) {
        throw new Problem("vocab.json does not fit config.json. Take both from one model.");
      }
      const characters = tokens.map((token, id) => [token, id]).filter(([, id]) => id !== model.size.start_id);
      tell("ready", { characters: new Map(characters) });
    },
    /** Write so many tokens after the source, or where there is none, go on. */
    async write({ text, source, length, seed, temperature, top_p }) {
      if (source) writer = new Writer(model, source, seed);
      const own = writer, started = performance.now();
      let pieces = [], told = started, count = 0;
      for (isStopped = false; count < length && !isStopped && writer === own; count++) {
        const [token, bits] = own.next({ temperature, top_p });
        pieces.push({ character: tokens[token], bits });
        if (performance.now() < told + 40) continue;
        tell("written", { text, pieces });
        pieces = [];
        await readMessages();
        told = performance.now();
      }
      tell("written", { text, pieces });
      tell("done", { text, count, seconds: (performance.now() - started) / 1000 });
    },
    stop: () => (isStopped = true),
    /** How much each token of a prompt surprises after those before it. */
    async measure({ text, source }) {
      const reader = new Writer(model, [], 0), bits = [];
      for (const token of source) {
        bits.push(reader.next({}, token)[1]);
        await readMessages();
      }
      tell("measured", { text, bits });
    },
    /** Example prompts: how the model begins a line. */
    async suggest() {
      const lineEnd = tokens.indexOf("\n"), lines = new Set();
      for (let seed = 0; seed < 12 && lines.size < 4; seed++) {
        const own = new Writer(model, lineEnd < 0 ? [] : [lineEnd, lineEnd], seed);
        let line = "";
        for (let i = 0; i < 24 && !line.endsWith("\n"); i++) {
          line += tokens[own.next({ temperature: 0.7, top_p: 0.9 })[0]];
          await readMessages();
        }
        if (line.trim().length > 2) lines.add(line.trim());
      }
      tell("suggested", { lines: [...lines] });
    },
  };
  self.onmessage = ({ data }) => Promise.resolve(data).then(tasks[data.task]).catch((error) => {
    const told = error instanceof Problem ? error.message : `This is a defect of the page: ${error}`;
    const isLarge = error instanceof RangeError; // as a browser says it
    tell("failed", { sentence: isLarge ? "The model needs more memory than this browser gives to a page." : told });
  });
}

// ----- the page -----

function startPage() {
  const part = (id) => document.getElementById(id);
  const numbers = () => ["length", "temperature", "top_p", "seed"].map((name) => [name, part(name).valueAsNumber]);
  let idOf = new Map(); // empty until the model is there
  let text = 0, prompted = [], written = []; // number and pieces of the text: { character, bits, isUnknown }

  /** Say what is going on; a state is a class of the sentence: loading, idle, busy or bad. */
  function say(sentence, state = "idle") {
    Object.assign(part("status"), { textContent: sentence, className: state });
    part("write").textContent = state === "busy" ? "Stop" : "Write";
    part("write").disabled = state === "loading" || state === "bad";
    part("continue").disabled = state !== "idle" || !text;
    part("text").setAttribute("aria-busy", state === "busy");
  }
  /** Add pieces of text. Those without colours stay plain text, which screen readers read better. */
  function show(id, pieces) {
    for (const { character, bits, isUnknown } of pieces) {
      const isColoured = bits !== undefined && part("colours").checked, tag = isUnknown ? "mark" : "span";
      const node = isUnknown || isColoured ? document.createElement(tag) : new Text();
      node.textContent = character;
      node.title = isUnknown ? "The model never saw this character" : `${bits?.toFixed(1)} bits`;
      node.className = character === "\n" ? "end" : "";
      if (isColoured) node.style.setProperty("--surprise", Math.min(1, bits / 8));
      part(id).append(node);
    }
    part(id).normalize(); // one text node instead of many
  }
  const known = () => prompted.filter((piece) => !piece.isUnknown);
  const source = () => known().map((piece) => idOf.get(piece.character));
  function showAll() {
    for (const [id, pieces] of Object.entries({ prompted, written })) {
      part(id).replaceChildren();
      show(id, pieces);
    }
    const isColoured = part("colours").checked;
    part("scale").hidden = !isColoured;
    if (isColoured && known().some((piece) => piece.bits === undefined)) {
      worker.postMessage({ task: "measure", text, source: source() });
    }
  }
  /** The prompt as pieces, in the normal form of Unicode that leaves the fewest characters unknown. */
  function readPrompt() {
    const given = part("prompt").value, forms = [given, given.normalize("NFC"), given.normalize("NFD")];
    const missing = (form) => [...form].filter((character) => !idOf.has(character)).length;
    const best = forms.reduce((a, b) => (missing(b) < missing(a) ? b : a));
    return [...best].map((character) => ({ character, isUnknown: !idOf.has(character) }));
  }
  /** Show what the fields hold: numbers of the sliders, unknown characters. */
  function check() {
    for (const output of document.querySelectorAll("label output")) output.value = part(output.htmlFor.value).value;
    const unknown = [...new Set(readPrompt().filter((piece) => piece.isUnknown).map((piece) => piece.character))];
    const code = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, 0)}`;
    const names = unknown.slice(0, 9).map((character) => `${character} (${code(character)})`);
    const told = `The model never saw ${names.join(", ")}${unknown.length > 9 ? " and more" : ""}. It reads the rest.`;
    const sentence = idOf.size && unknown.length ? told : "";
    if (part("unknown").textContent !== sentence) part("unknown").textContent = sentence; // else it is read aloud again
  }
  /** Fill in some fields, by name, and begin a text. */
  function start(values = []) {
    for (const [name, value] of values) if (part(name)?.form) part(name).value = value;
    check();
    if (!idOf.size || !part("form").reportValidity()) return;
    text += 1;
    prompted = readPrompt();
    written = [];
    showAll();
    write(source());
    part("text").scrollIntoView({ block: "nearest" });
  }
  /** Write after a source, or go on. */
  function write(from) {
    if (!from) part("write").focus(); // the button Continue is disabled now
    say("Writing …", "busy");
    worker.postMessage({ task: "write", text, source: from, ...Object.fromEntries(numbers()) });
  }
  const stop = () => worker.postMessage({ task: "stop" });
  function share() {
    history.replaceState(null, "", `#${new URLSearchParams([["prompt", part("prompt").value], ...numbers()])}`);
    part("shared").hidden = false;
    part("link").value = location.href;
    part("link").select();
    navigator.clipboard?.writeText(location.href).catch(() => {}); // some do not allow it; the link is there to copy
  }
  const answers = {
    loaded({ loaded, total }) {
      const told = `Loading the model: ${Math.floor((10 * loaded) / (total || Infinity))}0 %`;
      if (part("status").textContent !== told) say(told, "loading"); // ten times, because it is read aloud
    },
    ready({ characters }) {
      idOf = characters;
      say("Ready.");
      check();
      worker.postMessage({ task: "suggest" });
      window.onhashchange();
    },
    suggested({ lines }) {
      for (const line of lines) {
        const button = Object.assign(document.createElement("button"), { type: "button", textContent: line });
        button.onclick = () => start([["prompt", line]]);
        part("examples").append(button);
      }
      part("examples").hidden = !lines.length;
    },
    written({ pieces }) {
      written.push(...pieces);
      show("written", pieces);
    },
    done: ({ count, seconds }) => say(`${count} characters, ${Math.round(count / seconds)} a second.`),
    measured({ bits }) {
      known().forEach((piece, i) => (piece.bits = bits[i]));
      showAll();
    },
    failed: ({ sentence }) => say(sentence, "bad"),
  };

  if (location.protocol === "file:") {
    const remedy = "Run `python -m http.server` in its folder and open http://localhost:8000.";
    return say(`A page that was opened as a file may not load the model. ${remedy}`, "bad");
  }
  const worker = new Worker("demo.js");
  worker.onmessage = ({ data }) => (data.text ?? text) === text && answers[data.answer](data); // of no earlier text
  worker.onerror = () => say("This browser cannot run the model. Another one, or a newer one, can.", "bad");
  worker.postMessage({ task: "load", base: new URL(part("model").content, location.href).href });
  part("form").onsubmit = (event) => {
    event.preventDefault();
    part("status").className === "busy" ? stop() : start();
  };
  part("continue").onclick = () => write(null);
  part("form").oninput = check;
  part("reseed").onclick = () => start([["seed", Math.floor(Math.random() * 2 ** 31)]]);
  part("share").onclick = share;
  part("colours").onchange = showAll;
  document.onkeydown = ({ key, ctrlKey, metaKey }) => {
    if (key === "Escape") stop();
    if (key === "Enter" && (ctrlKey || metaKey)) start();
  };
  window.onhashchange = () => { // what servers do not see of an address
    if (location.hash.includes("=")) start(new URLSearchParams(location.hash.slice(1)));
  };
}

if (typeof document === "object") startPage();
else if (typeof importScripts === "function") startWorker();
