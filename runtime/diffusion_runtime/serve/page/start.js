// The picture to start from and the mask that is painted on it. props.value is JSON: {image, mask} as data URLs.
const find = (name) => element.querySelector(name);
const file = find("input[type=file]"), area = find(".sd-painting"), image = find("img"), canvas = find("canvas");
const brush = find(".sd-brush"), size = find(".sd-size"), erase = find(".sd-erase"), problem = find(".sd-problem");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const MOST_PIXELS = 2048; // of the mask's longer side
let picture = null, painted = false, last = null, at = null, kind = "none";

const show = () => {
    find(".sd-start").hidden = props.picture === false;
    canvas.hidden = find("#sd-keys").hidden = props.mask === false;
    find(".sd-tools").classList.toggle("sd-plain", props.mask === false);
    find(".sd-needs").textContent = props.needs || "";
    if (props.picture === false && picture) remove();
};

const tell = () => {
    const now = !picture ? "none" : painted && props.mask !== false ? "mask" : "picture";
    props.value = picture ? JSON.stringify({ image: picture, mask: now === "mask" ? mask() : null }) : "";
    if (now !== kind) trigger("given", { kind: now });
    kind = now;
};

const mask = () => {
    const whole = document.createElement("canvas");
    whole.width = canvas.width;
    whole.height = canvas.height;
    const to = whole.getContext("2d"), from = pen.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < from.data.length; i += 4) {
        const value = from.data[i + 3] > 127 ? 255 : 0;
        from.data[i] = from.data[i + 1] = from.data[i + 2] = value;
        from.data[i + 3] = 255;
    }
    to.putImageData(from, 0, 0);
    return whole.toDataURL("image/png");
};

const clear = () => {
    pen.clearRect(0, 0, canvas.width, canvas.height);
    painted = false;
};

const remove = () => {
    picture = null;
    file.value = "";
    area.hidden = true;
    image.removeAttribute("src");
    clear();
    tell();
};

const take = (data) => {
    problem.textContent = "";
    image.onload = () => {
        const scale = Math.min(1, MOST_PIXELS / Math.max(image.naturalWidth, image.naturalHeight));
        canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
        canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
        at = [canvas.width / 2, canvas.height / 2];
        area.hidden = false;
        picture = data;
        clear();
        tell();
    };
    image.onerror = () => {
        remove();
        problem.textContent = "This file is no picture that the browser knows.";
    };
    image.src = data;
};

file.addEventListener("change", () => {
    const chosen = file.files[0];
    if (!chosen) return;
    if (chosen.size * 1.4 > props.most) {
        remove();
        problem.textContent = "This file is too large for the server: expected less than "
            + Math.floor(props.most / 1.4 / 1048576) + " MiB.";
        return;
    }
    const reader = new FileReader();
    reader.onload = () => take(reader.result);
    reader.readAsDataURL(chosen);
});

const width = () => Math.max(1, Math.max(canvas.width, canvas.height) * size.value / 100);
const stroke = (from, to, off) => {
    pen.globalCompositeOperation = off ? "destination-out" : "source-over";
    pen.strokeStyle = "#e11d48";
    pen.lineWidth = width();
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    pen.moveTo(from[0], from[1]);
    pen.lineTo(to[0], to[1] + 0.01); // a line of no length is not drawn
    pen.stroke();
};
const settle = () => {
    const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
    painted = false;
    for (let i = 3; i < data.length && !painted; i += 4) painted = data[i] > 127;
    tell();
};
const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
};
const aim = () => {
    const box = canvas.getBoundingClientRect(), scale = box.width / canvas.width;
    brush.hidden = false;
    brush.style.width = brush.style.height = width() * scale + "px";
    brush.style.left = at[0] * scale + "px";
    brush.style.top = at[1] * scale + "px";
};

canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    last = at = place(event);
    stroke(last, last, erase.checked);
    aim();
});
canvas.addEventListener("pointermove", (event) => {
    at = place(event);
    if (last) {
        stroke(last, at, erase.checked);
        last = at;
    }
    aim();
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => {
    if (last) settle();
    last = null;
});
canvas.addEventListener("pointerleave", () => { brush.hidden = document.activeElement !== canvas; });
canvas.addEventListener("focus", aim);
canvas.addEventListener("blur", () => { brush.hidden = true; });
canvas.addEventListener("keydown", (event) => {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in ways) {
        const far = Math.max(canvas.width, canvas.height) * (event.shiftKey ? 0.1 : 0.02);
        at = [
            Math.min(canvas.width, Math.max(0, at[0] + ways[event.key][0] * far)),
            Math.min(canvas.height, Math.max(0, at[1] + ways[event.key][1] * far)),
        ];
        aim();
    } else if (event.key === " " || event.key === "Backspace" || event.key === "Delete") {
        stroke(at, at, event.key !== " " || erase.checked);
        settle();
    } else return;
    event.preventDefault();
});
size.addEventListener("input", () => { if (picture) aim(); });
find(".sd-clear").addEventListener("click", () => {
    clear();
    tell();
});
find(".sd-remove").addEventListener("click", () => {
    remove();
    file.focus();
});
watch(["picture", "mask", "needs"], show);
show();
