// The page: reads the prompt, lets the model write, shows what it considers next.
"use strict";

const $ = (id) => document.getElementById(id);
const about = JSON.parse($("model").textContent);
const tokenizer = new ant5m.Tokenizer(about.tokenizer);
const tensors = ant5m.readTensors(about.tensors, ant5m.decodeBase64($("weights").textContent));
$("weights").remove();
const model = new ant5m.Model(about.config, tensors);

let ids = []; // what the model has read
let run = 0; // number of the current run; a run that is not the current one stops
let timer = 0;

const settings = () => ({
  temperature: Number($("temperature").value),
  topP: Number($("top-p").value),
  penalty: Number($("penalty").value),
});

// Read `wanted`, keeping the beginning that has been read already. False when another run began meanwhile.
async function read(wanted, mine) {
  let same = 0;
  while (same < ids.length && same < wanted.length - 1 && ids[same] === wanted[same]) same++;
  ids.length = same;
  model.length = same;
  let rested = performance.now();
  for (let i = same; i < wanted.length; i++) {
    model.read(wanted[i], i + 1 < wanted.length);
    ids.push(wanted[i]);
    if (performance.now() - rested > 30) {
      await rest();
      rested = performance.now();
      if (mine !== run) return false;
    }
  }
  return true;
}

const rest = () => new Promise((resolve) => setTimeout(resolve));

function promptIds() {
  const prompt = tokenizer.encode($("prompt").value);
  return prompt.length ? prompt : [about.begin];
}

async function look() {
  const mine = ++run;
  busy(false);
  const wanted = promptIds();
  if (wanted.length >= about.config.context) return say(`The prompt is too long: ${wanted.length} tokens, the model reads ${about.config.context}.`);
  if (await read(wanted, mine)) showNext();
}

async function write() {
  const mine = ++run;
  const prompt = promptIds(), limit = Number($("length").value);
  show($("prompt").value, "");
  busy(false);
  $("loop").textContent = "";
  if (prompt.length >= about.config.context) return say(`The prompt is too long: ${prompt.length} tokens, the model reads ${about.config.context}.`);
  busy(true);
  say("Writing …");
  if (!(await read(prompt, mine))) return;
  const seen = new Set(prompt), started = performance.now();
  let text = "", why = `${limit} tokens were asked for`, written = 0, rested = started;
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  while (written < limit) {
    const next = ant5m.sample(model.logits, seen, settings(), Math.random());
    if (about.ends.includes(next)) { why = "the model ended its text"; break; }
    seen.add(next);
    written++;
    text += decoder.decode(tokenizer.bytes(next), { stream: true });
    if (ids.length === about.config.context) { why = `its context of ${about.config.context} tokens is full`; break; }
    model.read(next);
    ids.push(next);
    if (performance.now() - rested > 30) {
      show($("prompt").value, text);
      showNext();
      $("speed").textContent = speed(written, started); // not read aloud: it changes all the time
      await rest();
      rested = performance.now();
      if (mine !== run) return;
    }
  }
  show($("prompt").value, text + decoder.decode());
  showNext();
  busy(false);
  if (ant5m.loops(text)) $("loop").textContent = LOOPS;
  say(`${written} tokens, ${speed(written, started)}. It stopped because ${why}.`);
}

const LOOPS = "The text loops. Try a repetition penalty of 1.1 to 1.3, or a temperature of 0.8 to 1.";

const speed = (count, started) => `${(count / ((performance.now() - started) / 1000)).toFixed(0)} tokens/s`;

function stop() {
  if (!document.body.classList.contains("busy")) return;
  run++;
  busy(false);
  say("Stopped.");
}

function busy(yes) {
  document.body.classList.toggle("busy", yes);
  $("text").setAttribute("aria-busy", yes);
  $("stop").disabled = !yes;
}

function say(text) {
  $("status").textContent = text;
  $("speed").textContent = "";
}

function show(prompt, text) {
  $("given").textContent = prompt;
  $("written").textContent = text;
}

// The most likely tokens as buttons: one that is pressed is added to the prompt.
function showNext() {
  const focused = [...$("next").querySelectorAll("button:enabled")].indexOf(document.activeElement);
  const rows = ant5m.mostLikely(model.logits, 10).map(([id, chance]) => {
    const text = tokenizer.decode([id]), percent = `${(100 * chance).toFixed(1)} %`;
    const end = about.ends.includes(id);
    const row = document.createElement("li"), button = document.createElement("button");
    const token = document.createElement("code"), number = document.createElement("span");
    token.textContent = end ? "end of text" : visible(text);
    number.textContent = percent;
    button.type = "button";
    button.style.setProperty("--share", chance);
    button.setAttribute("aria-label", `${end ? "end of text" : JSON.stringify(text)}, ${percent}`);
    button.disabled = end || text.includes("\uFFFD"); // a part of a character cannot stand in the prompt
    button.append(token, number);
    button.addEventListener("click", () => {
      run++;
      busy(false);
      $("prompt").value += $("written").textContent + text;
      show("", "");
      look();
    });
    row.append(button);
    return row;
  });
  $("next").replaceChildren(...rows);
  if (focused >= 0) $("next").querySelectorAll("button:enabled")[focused]?.focus({ preventScroll: true });
}

const visible = (text) => text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\r/g, "␍").replace(/\t/g, "⇥") || "(empty)";

for (const id of ["temperature", "top-p", "penalty", "length"]) {
  const shown = () => { $(`${id}-value`).textContent = id === "length" ? $(id).value : Number($(id).value).toFixed(2); };
  $(id).addEventListener("input", shown);
  shown();
}
$("write").addEventListener("click", write);
$("stop").addEventListener("click", stop);
$("prompt").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(() => ($("live").checked ? write() : look()), 300);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write();
});
say("Type, and the model goes on.");
look();
