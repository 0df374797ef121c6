#!/bin/bash
# huggingface_hub 2.4.0: some download errors derive from Exception alone.
#
# Guess: whatever goes wrong with a download is an OSError (as requests' errors are) or a ValueError.
# What happens: errors of the Xet storage, of a damaged cache and of an unknown revision are neither.
# Seen: XetDownloadError False, CorruptedCacheException False, beside RepositoryNotFoundError True.
. "$(dirname "$0")/lib.sh"
install "huggingface_hub==2.4.0"
run <<'P'
from huggingface_hub import errors

names = ("XetDownloadError", "CorruptedCacheException", "RepositoryNotFoundError")
seen = {name: issubclass(getattr(errors, name), (OSError, ValueError)) for name in names}
print(seen)
assert seen == {"XetDownloadError": False, "CorruptedCacheException": False, "RepositoryNotFoundError": True}
P
