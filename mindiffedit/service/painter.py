"""A mask to paint on, as HTML: the picture under a canvas with a brush and an eraser, and the canvas read back.

Gradio's own image editor (of 6.17) shows no layers that it is given, which is where a mask that was computed would be.
"""

from __future__ import annotations

import base64
import itertools

import numpy as np
import PIL.Image

from mindiffedit.errors import InputError
from mindiffedit.images import reading, writing

COLOUR = "#1a6dff"
"""Of what is in the mask: one that few pictures are full of."""

EMPTY = "<p>The picture will be here.</p>"

_numbers = itertools.count()
_PNG = "data:image/png;base64,"

# In the canvas the colour is opaque or not there; that the picture shows through is a matter of style.
_PAINTER = """
<div class="tools" role="toolbar" aria-label="Mask">
  <label><input type="radio" name="tool" value="brush" checked> Brush</label>
  <label><input type="radio" name="tool" value="eraser"> Eraser</label>
  <label>Size <input type="range" min="2" max="40" value="12"></label>
  <button type="button">Clear</button>
</div>
<div class="layers">
  <img src="{picture}" alt="The picture" draggable="false">
  <canvas data-colour="{colour}"></canvas>
  <img src="{mask}#{number}" alt="" hidden onload="paintMask(this)">
</div>
"""

STYLE = """
#paint .tools { display: flex; flex-wrap: wrap; gap: 16px; align-items: center; margin-bottom: 8px; }
#paint .tools label { display: flex; gap: 6px; align-items: center; }
#paint .tools input { accent-color: var(--color-accent); }
#paint .tools button { padding: 2px 12px; border-radius: 6px; background: var(--button-secondary-background-fill);
                       color: var(--button-secondary-text-color); }
#paint .layers { position: relative; max-width: 512px; }
#paint .layers img:first-child { display: block; width: 100%; margin: 0; }
#paint .layers canvas { position: absolute; inset: 0; width: 100%; height: 100%; opacity: 0.55; cursor: crosshair;
                        touch-action: none; }
"""

HEAD = """<script>
function paintMask(mask) {
  if (!mask.isConnected) return;  // a draft of the page
  const canvas = mask.previousElementSibling, painter = mask.closest("#paint"), pen = canvas.getContext("2d");
  [canvas.width, canvas.height] = [mask.naturalWidth, mask.naturalHeight];
  pen.drawImage(mask, 0, 0);
  let last = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  const draw = (event) => {
    if (last === null) return;
    const next = place(event), erases = painter.querySelector("[value=eraser]").checked;
    pen.globalCompositeOperation = erases ? "destination-out" : "source-over";
    pen.lineWidth = painter.querySelector("[type=range]").value / 100 * Math.max(canvas.width, canvas.height);
    pen.lineCap = "round";
    pen.strokeStyle = canvas.dataset.colour;
    pen.beginPath();
    pen.moveTo(...last);
    pen.lineTo(...next);
    pen.stroke();
    last = next;
  };
  canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); last = place(event); draw(event); };
  canvas.onpointermove = draw;
  canvas.onpointerup = canvas.onpointercancel = () => { last = null; };
  painter.querySelector("button").onclick = () => pen.clearRect(0, 0, canvas.width, canvas.height);
}
</script>"""

READ = "() => document.querySelector('#paint canvas')?.toDataURL() ?? ''"
"""The canvas as a text, in JavaScript: what `painted_mask` takes."""


def painter(picture: PIL.Image.Image, mask: PIL.Image.Image | None = None) -> str:
    """The HTML of a picture (RGB) to paint a mask on, which begins as `mask` (grey, of its size) or empty."""
    layer = PIL.Image.new("RGBA", picture.size, COLOUR)
    layer.putalpha(PIL.Image.new("L", picture.size, 0) if mask is None else mask)
    # Gradio changes what differs in the page; by its number a mask is another one, though it be the same.
    number = next(_numbers)
    return _PAINTER.format(picture=_address(picture), mask=_address(layer), colour=COLOUR, number=number)


def painted_mask(canvas: str) -> PIL.Image.Image:
    """White where anything is painted, black elsewhere.

    Args:
        canvas: what `READ` gives: the address of a PNG file in RGBA, or "".

    Raises:
        InputError: Nothing is painted, or it is no such address.
    """
    if not canvas.startswith(_PNG):
        raise InputError("there is no mask yet; choose a picture and paint over what may change.")
    layer = reading.load_image(canvas, convert_method=lambda picture: picture.convert("RGBA"))
    painted = np.asarray(layer.getchannel("A")) >= 128
    if not painted.any():
        raise InputError("the mask is empty; paint over what may change.")
    return PIL.Image.fromarray(painted).convert("L")


def _address(picture: PIL.Image.Image) -> str:
    return _PNG + base64.b64encode(writing.encoded(picture, "PNG")).decode("ascii")
