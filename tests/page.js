// Runs the engine of a page in Node: node page.js PAGE QUESTIONS.json -> answers as JSON.
const fs = require("fs");
const page = fs.readFileSync(process.argv[2], "utf8");
const script = (id) => page.match(new RegExp(`<script id="${id}"[^>]*>([\\s\\S]*?)</script>`))[1];
(0, eval)(script("engine"));
const about = JSON.parse(script("model"));
const tokenizer = new ant5m.Tokenizer(about.tokenizer);
const tensors = ant5m.readTensors(about.tensors, ant5m.decodeBase64(script("weights")));
const { texts, ids, loops } = JSON.parse(fs.readFileSync(process.argv[3], "utf8"));
const model = new ant5m.Model(about.config, tensors);
const logits = [];
for (const id of ids) { model.read(id); logits.push([...model.logits]); }
const written = [], seen = new Set(ids), greedy = { temperature: 0, topP: 1, penalty: 1.1 };
while (ids.length + written.length < about.config.context) {
  const next = ant5m.sample(model.logits, seen, greedy, 0);
  if (about.ends.includes(next)) break;
  seen.add(next);
  written.push(next);
  model.read(next);
}
const counts = {};
for (let i = 0; i < 4000; i++) {
  const id = ant5m.sample([1, 2, 0, -1, 2], new Set([1]), { temperature: 0.7, topP: 0.9, penalty: 1.3 }, i / 4000);
  counts[id] = (counts[id] ?? 0) + 1 / 4000;
}
const started = performance.now();
model.length = 0;
for (let i = 0; i < 40; i++) model.read(ids[i % ids.length]);
console.log(JSON.stringify({
  encoded: texts.map((text) => tokenizer.encode(text)),
  decoded: texts.map((text) => tokenizer.decode(tokenizer.encode(text))),
  logits, written, text: tokenizer.decode(written), counts,
  loops: loops.map(ant5m.loops),
  speed: 40000 / (performance.now() - started),
}));
