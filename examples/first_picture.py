"""One call, one picture, and its request read back from the file."""

from pathlib import Path

import gesso
from gesso.metadata import read_record

result = gesso.generate("a large red star on a white background", seed=7)[0]
path = result.save(Path("star.png"))
request = read_record(path).request_for_this_picture()
print(f"{path}: {request.prompt!r}, seed {request.seed}, {request.width}x{request.height}")
