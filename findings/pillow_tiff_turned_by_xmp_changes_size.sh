#!/bin/bash
# Pillow 13.0.0: a TIFF that is turned by XMP alone has another size before load() than after it.
#
# Guess: Image.open(file).size is what load() gives, as it is with the orientation tag (274).
# What happens: the size in the header is swapped for the tag only; load() turns the picture by XMP's tiff:Orientation too. Who
# plans by the header, and decodes later, cuts another picture.
# Seen: (20, 10), then (10, 20).
. "$(dirname "$0")/lib.sh"
install pillow==13.0.0
run <<'P'
from io import BytesIO
from PIL import Image

XMP = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)

def sizes(**tags):
    data = BytesIO()
    Image.new("RGB", (20, 10)).save(data, format="TIFF", **tags)
    image = Image.open(BytesIO(data.getvalue()))
    before = image.size
    image.load()
    return before, image.size

seen = {"tag": sizes(tiffinfo={274: 6}), "xmp": sizes(tiffinfo={700: XMP})}
print(seen)
assert seen == {"tag": ((10, 20), (10, 20)), "xmp": ((20, 10), (10, 20))}, seen
P
