// The model and its tokenizer in plain JavaScript: what the page runs, and Node in the tests.
"use strict";

// Base64 -> bytes.
function decodeBase64(text) {
  const raw = atob(text.trim());
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

function halfToFloat(h) {
  const sign = h & 0x8000 ? -1 : 1, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

// ---------------------------------------------------------------------------------------- tokenizer

const WS = "\\p{White_Space}";
const CONTRACTIONS = "'(?:[sSſ]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])";
const TAIL = `| ?[^${WS}\\p{L}\\p{N}]+[\\r\\n]*|${WS}*[\\r\\n]+|${WS}+(?!\\P{White_Space})|${WS}+`;
const SPLITS = {
  "qwen2": `${CONTRACTIONS}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}${TAIL}`,
  "llama-bpe": `${CONTRACTIONS}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}${TAIL}`,
  "gpt-2": `'(?:s|t|re|ve|m|ll|d)| ?\\p{L}+| ?\\p{N}+| ?[^${WS}\\p{L}\\p{N}]+|${WS}+(?!\\P{White_Space})|${WS}+`,
};

class Tokenizer {
  // split: a name of SPLITS; tokens: spelling of every id; merges: [[left, right], ...]; added: ids whose
  // spelling is plain text; parsed: those of them that are recognized in a text.
  constructor({ split, tokens, merges, added, parsed, whole_words }) {
    this.pattern = new RegExp(SPLITS[split], "gu");
    this.tokens = tokens;
    this.added = new Set(added);
    this.wholeWords = whole_words;
    this.ids = new Map(tokens.map((token, id) => [token, id]));
    this.ranks = new Map(merges.map(([left, right], rank) => [`${left} ${right}`, rank]));
    const spelled = parsed.map((id) => tokens[id]).sort((a, b) => b.length - a.length);
    const escaped = spelled.map((text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.parsed = escaped.length ? new RegExp(`(${escaped.join("|")})`) : null;
    this.words = new Map();
    // GPT-2's spelling of bytes: printable ones as they are, the others from U+0100 on.
    this.charOfByte = [];
    this.byteOfChar = new Map();
    let next = 256;
    for (let byte = 0; byte < 256; byte++) {
      const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
      const char = String.fromCharCode(printable ? byte : next++);
      this.charOfByte.push(char);
      this.byteOfChar.set(char, byte);
    }
  }

  encode(text) {
    const pieces = this.parsed ? text.split(this.parsed) : [text];
    const ids = [];
    pieces.forEach((piece, i) => {
      if (i % 2) ids.push(this.ids.get(piece));
      else for (const [word] of piece.matchAll(this.pattern)) for (const id of this.encodeWord(word)) ids.push(id);
    });
    return ids;
  }

  encodeWord(word) {
    const known = this.words.get(word);
    if (known) return known;
    let parts = [...new TextEncoder().encode(word)].map((byte) => this.charOfByte[byte]);
    if (this.wholeWords && this.ids.has(parts.join(""))) parts = [parts.join("")];
    while (parts.length > 1) {
      let best = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank < best) best = rank;
      }
      if (best === Infinity) break;
      const merged = [];
      for (let i = 0; i < parts.length; i++) {
        if (i + 1 < parts.length && this.ranks.get(`${parts[i]} ${parts[i + 1]}`) === best) {
          merged.push(parts[i] + parts[++i]);
        } else merged.push(parts[i]);
      }
      parts = merged;
    }
    const ids = parts.map((part) => this.ids.get(part)).filter((id) => id !== undefined);
    this.words.set(word, ids);
    return ids;
  }

  bytes(id) {
    const token = this.tokens[id] ?? "";
    if (this.added.has(id)) return new TextEncoder().encode(token);
    return Uint8Array.from([...token], (char) => this.byteOfChar.get(char));
  }

  decode(ids) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return ids.map((id) => decoder.decode(this.bytes(id), { stream: true })).join("") + decoder.decode();
  }
}

// -------------------------------------------------------------------------------------------- model

// A matrix [rows, columns]: numbers in f32, or int8 with one scale a row.
class Matrix {
  constructor(rows, columns, values, scales) {
    Object.assign(this, { rows, columns, values, scales });
  }

  row(index, out) {
    const scale = this.scales ? this.scales[index] : 1;
    for (let i = 0; i < this.columns; i++) out[i] = this.values[index * this.columns + i] * scale;
  }

  times(x, out) {
    const { rows, columns, values, scales } = this;
    for (let r = 0, at = 0; r < rows; r++) {
      let a = 0, b = 0, c = 0, d = 0, i = 0;
      for (; i + 3 < columns; i += 4, at += 4) {
        a += values[at] * x[i];
        b += values[at + 1] * x[i + 1];
        c += values[at + 2] * x[i + 2];
        d += values[at + 3] * x[i + 3];
      }
      for (; i < columns; i++, at++) a += values[at] * x[i];
      out[r] = (a + b + (c + d)) * (scales ? scales[r] : 1);
    }
    return out;
  }
}

// Views of the tensors in one buffer, as `ant5m.export.html` lays them out.
function readTensors(tensors, bytes) {
  const found = {};
  for (const { name, shape, type, offset, scales } of tensors) {
    const count = shape.reduce((a, b) => a * b, 1);
    let values;
    if (type === "f32") values = new Float32Array(bytes.buffer, offset, count);
    else if (type === "int8") values = new Int8Array(bytes.buffer, offset, count);
    else values = Float32Array.from(new Uint16Array(bytes.buffer, offset, count), halfToFloat);
    const factors = type === "int8" ? new Float32Array(bytes.buffer, scales, shape[0]) : null;
    found[name] = shape.length === 1 ? values : new Matrix(shape[0], shape[1], values, factors);
  }
  return found;
}

function rmsNorm(x, weight, eps, out) {
  let sum = 0;
  for (const value of x) sum += value * value;
  const scale = 1 / Math.sqrt(sum / x.length + eps);
  for (let i = 0; i < x.length; i++) out[i] = x[i] * scale * weight[i];
  return out;
}

class Model {
  // A Llama or Qwen3 that reads one token after the other and remembers keys and values.
  constructor(config, tensors) {
    this.config = config;
    this.tensors = tensors;
    const { layers, heads, kvHeads, headSize, width, inner, context, vocab } = config;
    const zeros = (count) => new Float32Array(count);
    this.keys = Array.from({ length: layers }, () => zeros(context * kvHeads * headSize));
    this.values = Array.from({ length: layers }, () => zeros(context * kvHeads * headSize));
    this.x = zeros(width); this.normed = zeros(width); this.update = zeros(width);
    this.q = zeros(heads * headSize); this.seen = zeros(heads * headSize);
    this.k = zeros(kvHeads * headSize); this.v = zeros(kvHeads * headSize);
    this.gate = zeros(inner); this.up = zeros(inner);
    this.scores = zeros(context);
    this.logits = zeros(vocab);
    this.frequencies = Array.from({ length: headSize / 2 }, (_, j) =>
      Math.fround(1 / Math.fround(config.ropeTheta ** ((2 * j) / headSize))));
    this.length = 0;
  }

  // Read one token; the logits of the next one are left in `logits` unless `quiet`.
  read(token, quiet = false) {
    const { layers, eps, qkNorm } = this.config, { x, normed, update, tensors } = this;
    if (this.length >= this.config.context) throw new Error("the context is full");
    const part = (layer, name) => tensors[`model.layers.${layer}.${name}.weight`];
    tensors["model.embed_tokens.weight"].row(token, x);
    for (let layer = 0; layer < layers; layer++) {
      rmsNorm(x, part(layer, "input_layernorm"), eps, normed);
      part(layer, "self_attn.q_proj").times(normed, this.q);
      part(layer, "self_attn.k_proj").times(normed, this.k);
      part(layer, "self_attn.v_proj").times(normed, this.v);
      if (qkNorm) {
        this.normHeads(this.q, part(layer, "self_attn.q_norm"));
        this.normHeads(this.k, part(layer, "self_attn.k_norm"));
      }
      this.rotate(this.q);
      this.rotate(this.k);
      this.attend(layer);
      part(layer, "self_attn.o_proj").times(this.seen, update);
      for (let i = 0; i < x.length; i++) x[i] += update[i];
      rmsNorm(x, part(layer, "post_attention_layernorm"), eps, normed);
      part(layer, "mlp.gate_proj").times(normed, this.gate);
      part(layer, "mlp.up_proj").times(normed, this.up);
      for (let i = 0; i < this.gate.length; i++) this.gate[i] *= this.up[i] / (1 + Math.exp(-this.gate[i]));
      part(layer, "mlp.down_proj").times(this.gate, update);
      for (let i = 0; i < x.length; i++) x[i] += update[i];
    }
    this.length++;
    if (quiet) return;
    rmsNorm(x, tensors["model.norm.weight"], eps, normed);
    (tensors["lm_head.weight"] ?? tensors["model.embed_tokens.weight"]).times(normed, this.logits);
  }

  normHeads(vector, weight) {
    const { headSize, eps } = this.config;
    for (let at = 0; at < vector.length; at += headSize) {
      const head = vector.subarray(at, at + headSize);
      rmsNorm(head, weight, eps, head);
    }
  }

  // RoPE: dimension j of a head is rotated with j + half.
  rotate(vector) {
    const { headSize } = this.config, half = headSize / 2;
    for (let j = 0; j < half; j++) {
      const angle = Math.fround(this.length * this.frequencies[j]), cos = Math.cos(angle), sin = Math.sin(angle);
      for (let at = j; at < vector.length; at += headSize) {
        const a = vector[at], b = vector[at + half];
        vector[at] = a * cos - b * sin;
        vector[at + half] = b * cos + a * sin;
      }
    }
  }

  attend(layer) {
    const { heads, kvHeads, headSize } = this.config, { q, seen, scores } = this;
    const keys = this.keys[layer], values = this.values[layer], stride = kvHeads * headSize;
    keys.set(this.k, this.length * stride);
    values.set(this.v, this.length * stride);
    seen.fill(0);
    for (let head = 0; head < heads; head++) {
      const own = head * headSize, shared = Math.floor((head * kvHeads) / heads) * headSize;
      let largest = -Infinity, total = 0;
      for (let t = 0; t <= this.length; t++) {
        let score = 0;
        for (let i = 0, at = t * stride + shared; i < headSize; i++) score += q[own + i] * keys[at + i];
        scores[t] = score / Math.sqrt(headSize);
        if (scores[t] > largest) largest = scores[t];
      }
      for (let t = 0; t <= this.length; t++) total += scores[t] = Math.exp(scores[t] - largest);
      for (let t = 0; t <= this.length; t++) {
        const share = scores[t] / total;
        for (let i = 0, at = t * stride + shared; i < headSize; i++) seen[own + i] += share * values[at + i];
      }
    }
  }
}

// ----------------------------------------------------------------------------------------- sampling

function softmax(logits) {
  let largest = -Infinity, total = 0;
  for (const value of logits) if (value > largest) largest = value;
  const out = Float64Array.from(logits, (value) => Math.exp(value - largest));
  for (const value of out) total += value;
  for (let i = 0; i < out.length; i++) out[i] /= total;
  return out;
}

// The next token: repetition penalty, temperature, top-p, as `ant5m generate` defines them. `seen` is a set
// of ids, `uniform` a number in [0, 1).
function sample(logits, seen, { temperature, topP, penalty }, uniform) {
  const scores = Float64Array.from(logits);
  for (const id of seen) scores[id] = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty;
  if (temperature === 0) return scores.reduce((best, value, id) => (value > scores[best] ? id : best), 0);
  const probabilities = softmax(scores.map((value) => value / temperature));
  let ids = Array.from(probabilities.keys());
  if (topP < 1) {
    ids.sort((a, b) => probabilities[b] - probabilities[a]);
    let kept = 0, sum = 0;
    while (kept < ids.length && sum < topP) sum += probabilities[ids[kept++]];
    ids = ids.slice(0, kept);
  }
  let left = uniform * ids.reduce((sum, id) => sum + probabilities[id], 0);
  for (const id of ids) if ((left -= probabilities[id]) < 0) return id;
  return ids[ids.length - 1];
}

// The `count` most likely next tokens: [[id, probability], ...].
function mostLikely(logits, count) {
  const probabilities = softmax(logits);
  return Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]).slice(0, count).map((id) => [id, probabilities[id]]);
}

// Does a text repeat itself more than people do? The measure and the limits of `ant5m generate`.
function loops(text) {
  const words = text.match(/[\p{L}\p{N}_]{1,12}|[^\p{L}\p{N}_\s]/gu) ?? [];
  const grams = new Set();
  for (let i = 0; i + 4 <= words.length; i++) grams.add(words.slice(i, i + 4).join("\n"));
  if (words.length >= 4 && 1 - grams.size / (words.length - 3) > 0.3) return true;
  for (let period = 1; period <= words.length / 4; period++) {
    for (let i = period, same = 0; i < words.length; i++) {
      same = words[i] === words[i - period] ? same + 1 : 0;
      if (same + period >= 12 && same + period >= 4 * period) return true;
    }
  }
  return false;
}

globalThis.ant5m = { decodeBase64, readTensors, Tokenizer, Model, sample, softmax, mostLikely, loops };
