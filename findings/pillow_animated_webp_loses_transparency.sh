#!/bin/bash
# Pillow 13.0.0: an animated WebP of opaque frames that do not cover the canvas opens as RGB, black where nothing is drawn.
#
# Guess: mode RGBA, transparent where no frame has drawn, which is what the file says and browsers show.
# What happens: whether there is alpha is read from the file's header, which says no, since each frame is opaque; the alpha of
# the canvas that the frames are composed on is dropped.
# Seen: mode RGB, corner (0, 0, 0) in an animation that was saved with a transparent corner.
. "$(dirname "$0")/lib.sh"
install pillow==13.0.0
run <<'P'
from io import BytesIO
from PIL import Image

first = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
first.paste((255, 0, 0, 255), (8, 0, 16, 16))
data = BytesIO()
first.save(data, format="WEBP", lossless=True, save_all=True, append_images=[first.rotate(90)])
with Image.open(BytesIO(data.getvalue())) as image:
    seen = (image.mode, image.getpixel((2, 2)), image.getpixel((12, 2)))
print(seen)
assert seen == ("RGB", (0, 0, 0), (255, 0, 0)), seen
P
