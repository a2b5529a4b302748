// What is being drawn, and what was: props.value is JSON, as drawing.py tells it.
const find = (name) => element.querySelector(name);
const shown = find(".sd-shown"), progress = find("progress"), told = find(".sd-told"), one = find(".sd-one");
const all = [];
const MOST = 60; // pictures that are kept, the oldest go
let selected = null, working = false;

const url = (png) => "data:image/png;base64," + png;

const select = (picture) => {
    selected = picture;
    shown.src = url(picture.png);
    shown.alt = picture.prompt || "A picture without a prompt";
    shown.hidden = one.hidden = false;
    const save = find(".sd-save"), list = find(".sd-how");
    save.href = url(picture.png);
    save.download = "picture-" + picture.seed + ".png";
    list.replaceChildren();
    for (const [name, value] of Object.entries(picture.record)) {
        for (const [kind, text] of [["dt", name], ["dd", value]]) {
            const entry = document.createElement(kind);
            entry.textContent = text;
            list.append(entry);
        }
    }
    for (const other of all) other.button.setAttribute("aria-pressed", String(other === picture));
};

const add = (picture) => {
    const entry = document.createElement("li"), small = document.createElement("img");
    picture.button = document.createElement("button");
    picture.button.type = "button";
    small.src = url(picture.png);
    small.alt = picture.prompt + " (seed " + picture.seed + ")";
    picture.button.append(small);
    picture.button.addEventListener("click", () => { if (!working) select(picture); });
    entry.append(picture.button);
    find(".sd-gallery").prepend(entry);
    all.push(picture);
    if (all.length > MOST) all.shift().button.parentElement.remove();
    find(".sd-all").hidden = false;
};

const begin = () => {
    working = true;
    one.hidden = shown.hidden = true;
    progress.hidden = false;
    if (matchMedia("(max-width: 700px)").matches) find(".sd-made").scrollIntoView({ block: "start" });
};

const end = () => {
    working = false;
    progress.hidden = true;
};

const show = () => {
    if (!props.value) return;
    const news = JSON.parse(props.value);
    told.textContent = news.text;
    told.classList.toggle("sd-problem", news.state === "failed");
    if (news.state === "working") {
        if (!working) begin();
        progress.value = news.done;
        if (news.preview) {
            shown.src = url(news.preview);
            shown.alt = "Preview";
            shown.hidden = false;
        }
        return;
    }
    end();
    if (news.state === "made") {
        add(news);
        select(news);
    } else if (selected) select(selected);
    else shown.hidden = true;
};

find(".sd-reuse").addEventListener("click", () => { if (selected) trigger("reuse", { seed: selected.seed }); });
watch("value", show);
