// As much of a browser as klflow_ext/cli/page.html asks for. node dom.js PAGE: runs its script, presses keys, prints what is seen.
"use strict";
const fs = require("fs"), vm = require("vm");
const page = fs.readFileSync(process.argv[2], "utf8");

class Element {
  constructor(tag, namespaceURI) { Object.assign(this, {tagName: tag.toUpperCase(), namespaceURI, attributes: {}, children: [], handlers: {}, own: "", className: "", hidden: false, value: "", max: ""}); }
  setAttribute(name, value) { this.attributes[name] = String(value); if (name === "class") this.className = String(value); }
  getAttribute(name) { return name in this.attributes ? this.attributes[name] : null; }
  appendChild(child) { this.children.push(child); child.parent = this; return child; }
  replaceChildren() { this.children = []; }
  set textContent(text) { this.own = text; this.children = []; }
  get textContent() { return this.own + this.children.map(child => child.textContent).join(""); }
  addEventListener(kind, handler) { this.handlers[kind] = handler; }
  closest() { return "data-place" in this.attributes ? this : null; }
  getBoundingClientRect() { return {left: 0, width: 600}; }
  get classList() { return {toggle: (name, on) => { this.className = on ? name : ""; }}; }
}

const known = {};
for (const [, tag, id] of page.matchAll(/<(\w+)[^>]* id="(\w+)"/g))
  known[id] = new Element(tag, tag === "svg" ? "http://www.w3.org/2000/svg" : "");
known.data.own = page.match(/<script type="application\/json" id="data">([^]*?)<\/script>/)[1];
const handlers = {}, timers = [];
const document = {
  getElementById: id => known[id],
  createElement: tag => new Element(tag, ""),
  createElementNS: (space, tag) => new Element(tag, space),
  addEventListener: (kind, handler) => { handlers[kind] = handler; },
};
const script = page.match(/<script>([^]*?)<\/script>/)[1];
vm.runInNewContext(script, {document, addEventListener() {}, setInterval: f => timers.push(f), clearInterval: () => { timers.length = 0; }});

const seen = {};
const look = name => { seen[name] = {count: known.count.textContent, text: known.text.textContent, classes: known.text.children.filter(c => c.tagName === "SPAN").map(c => c.className), tops: known.tops.textContent, svg: known.entropy.children.map(c => c.tagName + (c.attributes.points || ""))}; };
const press = key => handlers.keydown({key, target: new Element("body"), preventDefault() {}});
look("first");
press("ArrowRight"); look("second");
press("End"); look("last");
press("Home"); press(" ");
while (timers.length) timers[0]();
look("played");
known.slider.handlers.input({target: {value: "2"}}); look("slid");
known.text.handlers.pointerover({target: known.text.children[known.text.children.length - 2]}); look("pointed");
known.entropy.handlers.click({clientX: 585}); look("clicked");
console.log(JSON.stringify(seen));
