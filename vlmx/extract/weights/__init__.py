"""What do the published checkpoints hold, and where are they? Found, fetched, read safely, named and converted.

`find` gives the file of a backbone and downloads it if need be; `read_checkpoint` the tensors of a file or folder of
any known format, running nothing in it; `identity` the SHA-256 that caches record. Which backbones a state dict fits is
in `identify`, writing safetensors in `convert`, the commands in `command`.
"""

from vlmx.extract.weights.formats import read, read_checkpoint
from vlmx.extract.weights.hashing import identity, sha256_of_file, sha256_of_state
from vlmx.extract.weights.lookup import WEIGHTS_FOLDER, find
from vlmx.extract.weights.names import backbone_of_detector, strip_prefix, unwrapped
from vlmx.extract.weights.state_dicts import Checkpoint

__all__ = [
    "WEIGHTS_FOLDER",
    "Checkpoint",
    "backbone_of_detector",
    "find",
    "identity",
    "read",
    "read_checkpoint",
    "sha256_of_file",
    "sha256_of_state",
    "strip_prefix",
    "unwrapped",
]
