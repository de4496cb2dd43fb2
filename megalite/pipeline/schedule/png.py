"""A picture as PNG: boxes and labels in a font of 3 x 5 dots. Drawn here so that no plotting library is needed."""

import struct
import zlib

from megalite.pipeline.schedule.picture import FAINT, INK, PAPER, Colour, Picture, fits, ink_on

GLYPHS = {
    part[0]: part[2:]
    for part in (
        "0:75557 1:26227 2:71747 3:71717 4:55711 5:74717 6:74757 7:71122 8:75757 9:75717"
        " A:25755 B:65656 C:34443 D:65556 E:74647 F:74644 G:34553 H:55755 I:72227 J:11152 K:55655 L:44447 M:57755"
        " N:75555 O:25552 P:65644 Q:25563 R:65655 S:34216 T:72222 U:55557 V:55552 W:55775 X:55255 Y:55222 Z:71247"
        " .:00002 ,:00024 -:00700 _:00007 %:51245 /:11244 ;:02024 ::02020"
    ).split()
}
"""Five rows of three dots, each row a digit: 4 is the left dot, 2 the middle, 1 the right."""


def png(picture: Picture, zoom: int = 2) -> bytes:
    """The file's bytes, `zoom` dots a pixel, 8-bit RGB. Small letters become capitals; no glyph: a space."""
    canvas = _Canvas(picture.width * zoom, picture.height * zoom)
    for box in picture.boxes:
        edge = zoom // 2 if box.label else 0
        right, bottom = round((box.x + box.width) * zoom), round((box.y + box.height) * zoom)
        left, top = round(box.x * zoom), round(box.y * zoom)
        canvas.fill(left, top, max(left + 1, right - edge), bottom, box.colour)
        if fits(box):
            width = 4 * zoom * len(box.label) - zoom
            x, y = (left + right - width) // 2, (top + bottom - 5 * zoom) // 2
            canvas.write(x, y, box.label, zoom, ink_on(box.colour))
    for label in picture.labels:
        size = zoom if label.small else zoom + zoom // 2
        width = 4 * size * len(label.text) - size
        left = round(label.x * zoom) - {"start": 0, "middle": width // 2, "end": width}[label.anchor]
        canvas.write(left, round(label.y * zoom) - 6 * size, label.text, size, FAINT if label.small else INK)
    return canvas.encoded()


class _Canvas:
    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows = [bytearray(bytes(PAPER) * width) for _ in range(height)]

    def fill(self, left: int, top: int, right: int, bottom: int, colour: Colour) -> None:
        left, right = max(0, left), min(self.width, right)
        for row in self.rows[max(0, top) : max(0, bottom)]:
            row[3 * left : 3 * right] = bytes(colour) * max(0, right - left)

    def write(self, x: int, y: int, text: str, size: int, colour: Colour) -> None:
        for place, letter in enumerate(text.upper()):
            for down, dots in enumerate(GLYPHS.get(letter, "00000")):
                for across in range(3):
                    if int(dots) & 4 >> across:
                        left, top = x + (4 * place + across) * size, y + down * size
                        self.fill(left, top, left + size, top + size, colour)

    def encoded(self) -> bytes:
        """Signature, header, pixels (no filter), end: the PNG specification, 2003."""
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        pixels = zlib.compress(b"".join(b"\0" + row for row in self.rows), 9)
        chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
