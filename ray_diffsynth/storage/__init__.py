"""Files behind a path or a URL (`s3://`, `gs://`, `memory://` …): the few operations that data and cache need.

A path without a scheme is local and goes to the operating system directly, so that any character may stand in it.
"""

from ray_diffsynth.storage.folders import move, remove_folder, write_folder_atomic
from ray_diffsynth.storage.listing import existing, file_sizes, list_files, list_folders, list_unfinished
from ray_diffsynth.storage.members import MemberError, member_of, member_path, member_stamp, without_place
from ray_diffsynth.storage.paths import StorageError, absolute, filesystem, is_hidden, join, local_path
from ray_diffsynth.storage.raw import stamp_of
from ray_diffsynth.storage.read import exists, file_size, is_folder, open_input, read_bytes, read_stamped, stamp
from ray_diffsynth.storage.temporary import is_own_temporary, is_temporary
from ray_diffsynth.storage.write import create_new, remove, write_bytes_atomic
from ray_diffsynth.urls import is_remote

__all__ = [
    "MemberError",
    "StorageError",
    "absolute",
    "create_new",
    "existing",
    "exists",
    "file_size",
    "file_sizes",
    "filesystem",
    "is_folder",
    "is_hidden",
    "is_own_temporary",
    "is_remote",
    "is_temporary",
    "join",
    "list_files",
    "list_folders",
    "list_unfinished",
    "local_path",
    "member_of",
    "member_path",
    "member_stamp",
    "move",
    "open_input",
    "read_bytes",
    "read_stamped",
    "remove",
    "remove_folder",
    "stamp",
    "stamp_of",
    "without_place",
    "write_bytes_atomic",
    "write_folder_atomic",
]
