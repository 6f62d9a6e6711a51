"""beacon_memory for vLLM: requests behind stored memories, which are put into vLLM's cache of keys and values.

`write_model_folder` writes the model as a folder that vLLM loads. `Fronts` tells what stands in front of a prompt, and
`connector.BeaconMemoryConnector`, which vLLM loads by `kv_connector_module_path`, puts the K/V of it into the cache.
Nothing here imports transformers but `write_model_folder`, when it is called.
"""

from .fronts import Front, Fronts
from .model_folder import write_model_folder

__all__ = ["Front", "Fronts", "write_model_folder"]
