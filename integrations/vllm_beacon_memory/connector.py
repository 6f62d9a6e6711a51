"""The KV connector that vLLM loads: it puts the K/V of memories into vLLM's cache, in place of the placeholders.

The half in the scheduler checks the parameters of each request and says how many of its tokens need not be computed;
the half in the worker reads the files and writes K/V into the blocks that the request was given, by vLLM's own
function of its attention backend, so whatever form the cache has.

Nothing is answered in front of which something else stands than was asked for: a request that cannot have its memory
ends with the finish reason `error`, and the log says why. All others go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from beacon_memory.errors import BeaconMemoryError, ConfigError, InputError

from .fronts import PARAMETER, SALT, Front, Fronts, Part, places_in_blocks

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["BeaconMemoryConnector"]

logger = init_logger(f"vllm.{__name__}")  # vLLM shows its own loggers


@dataclass(frozen=True, slots=True)
class Load:
    """Tell what the worker loads for a request, into which blocks.

    start, stop: the slots that are loaded. blocks: ids of all blocks of the request, the first one for its slot 0.
    parts: see `Front`; None for a request that is refused.
    """

    request: str
    parts: tuple[Part, ...] | None
    start: int
    stop: int
    blocks: tuple[int, ...]


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Tell the worker what to load in a step."""

    loads: list[Load] = field(default_factory=list)


class BeaconMemoryConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Put stored memories in front of requests.

    In vLLM's `KVTransferConfig`: kv_connector="BeaconMemoryConnector", kv_role="kv_consumer",
    kv_connector_module_path="vllm_beacon_memory.connector", and in kv_connector_extra_config `store`, and `namespace`
    if the documents are in one: no request reaches another. The model is a folder that `write_model_folder` wrote.

    Raises ConfigError for settings with which memories could not be used, or not rightly.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _require_usable(vllm_config, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self._fronts = Fronts(extra["store"], vllm_config.model_config.model, extra.get("namespace", ""))
        self._block_size = int(vllm_config.cache_config.block_size)
        self._asked: dict[str, Front | None] = {}  # by request; None for one that is refused
        self._due = Loads()
        self._loaded: set[str] = set()
        self._failed: set[str] = set()

    def on_new_request(self, request: Request) -> None:
        """Check the memory that a request asks for."""
        ours = PARAMETER in (request.kv_transfer_params or {})
        if not ours and not (request.cache_salt or "").startswith(SALT):
            return
        try:
            self._asked[request.request_id] = self._checked(request)
        except Exception as error:  # noqa: BLE001  # else all requests end with this one
            self._asked[request.request_id] = None
            request.skip_reading_prefix_cache = True  # so that it comes to `get_num_new_matched_tokens` with no hit
            _log_refusal(request.request_id, error)

    def _checked(self, request: Request) -> Front:
        """Return what stands in front of a request; raises BeaconMemoryError if that cannot be."""
        front = self._fronts.requested(request.kv_transfer_params)
        given = request.prompt_token_ids or []
        if request.cache_salt != front.cache_salt or [*given[: front.slots]] != front.token_ids:
            raise InputError(
                "prompt and cache_salt are not those of the memory that kv_transfer_params name; take them from "
                "`Front.prompt` as they are, and do not let them be truncated"
            )
        if len(given) == front.slots:
            raise InputError("the prompt is empty: something has to follow the memory")
        if request.skip_reading_prefix_cache:
            raise InputError(
                "prompt_logprobs and skip_reading_prefix_cache need all tokens of the prompt computed, and those of a "
                "memory are not; ask without"
            )
        if request.sampling_params is None or request.sampling_params.repetition_penalty != 1:
            raise InputError(
                "repetition_penalty counts the tokens of the prompt, and those of a memory stand for no text; take "
                "frequency_penalty or presence_penalty, which count those of the answer"
            )
        for part in front.parts:
            self._fronts.store.uses.add(part.id)
        return front

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many slots of the memory are to be loaded, those that vLLM's prefix cache does not have."""
        if request.request_id not in self._asked:
            return 0, False
        front = self._asked[request.request_id]
        if front is None:
            request.skip_reading_prefix_cache = False  # else nothing would be loaded that can fail
            return 1, True
        missing = front.slots - num_computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Note what is to be loaded, and where."""
        if num_external_tokens <= 0:
            return
        front = self._asked[request.request_id]
        stop = num_external_tokens if front is None else front.slots
        parts = None if front is None else front.parts
        (ids,) = blocks.get_block_ids()
        own = tuple(ids[: -(-stop // self._block_size)])
        self._due.loads.append(Load(request.request_id, parts, stop - num_external_tokens, stop, own))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Loads:  # noqa: ARG002
        """Return what the worker is to load in this step."""
        due, self._due = self._due, Loads()
        return due

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, None]:  # noqa: ARG002
        """Forget a request; its blocks are vLLM's."""
        self._asked.pop(request.request_id, None)
        return False, None

    def shutdown(self) -> None:
        """Close the store."""
        self._fronts.store.close()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # noqa: ARG002
        """Load what is due in this step."""
        for load in cast(Loads, self._get_connector_metadata()).loads:
            self._loaded.add(load.request)
            if load.parts is None:
                self._failed.add(load.request)
                continue
            try:
                self._load(load, load.parts)
            except Exception as error:  # noqa: BLE001  # else all requests end with this one
                self._failed.add(load.request)
                _log_refusal(load.request, error)

    def _load(self, load: Load, parts: tuple[Part, ...]) -> None:
        layers = [*self._layers()]
        device, dtype = layers[0].kv_cache.device, self._vllm_config.model_config.dtype
        keys, values = self._fronts.load(parts, load.start, load.stop, device=device, dtype=dtype)
        places = places_in_blocks(load.blocks, self._block_size, load.start, load.stop).to(device)
        for number, layer in enumerate(layers):
            by_token = (part[number].transpose(0, 1).contiguous() for part in (keys, values))
            layer.impl.do_kv_cache_update(layer, *by_token, layer.kv_cache, places)

    def _layers(self) -> Iterator[Any]:
        """Yield vLLM's attention layers in the order of the model."""
        context = self._vllm_config.compilation_config.static_forward_context
        (group,) = self._kv_cache_config.kv_cache_groups
        for name in sorted(group.layer_names, key=extract_layer_index):
            yield context[name]

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:  # noqa: ARG002
        """Tell of which requests the memory was loaded, and of which it could not be."""
        results = KVConnectorTransferResults(finished_recving=self._loaded, failed_recving=self._failed)
        self._loaded, self._failed = set(), set()
        return results

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: what was loaded is there."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: documents are stored by `BeaconMemory`."""

    def wait_for_save(self) -> None:
        """Do nothing: nothing is saved."""


def _require_usable(config: VllmConfig, cache: KVCacheConfig) -> None:
    """Raise ConfigError for settings of vLLM with which memories could not be used, or not rightly."""
    transfer, parallel = config.kv_transfer_config, config.parallel_config
    flaws = {
        "kv_connector_extra_config must have `store`, the folder or URL of the documents": (
            "store" not in transfer.kv_connector_extra_config
        ),
        "kv_load_failure_policy must be 'fail': placeholders cannot be recomputed": (
            transfer.kv_load_failure_policy != "fail"
        ),
        "tensor and pipeline parallelism must be 1: each worker takes whole memories": parallel.world_size > 1,
        "hf_overrides must be empty: memories belong to the model as it was written": config.model_config.hf_overrides,
        "speculative_config must be None: a draft model has no memories": config.speculative_config,
        "the model must have one kind of attention": len(cache.kv_cache_groups) != 1,
    }
    for flaw, found in flaws.items():
        if found:
            raise ConfigError(f"vLLM cannot have memories with these settings: {flaw}")


def _log_refusal(request: str, error: Exception) -> None:
    unexpected = None if isinstance(error, BeaconMemoryError) else error
    logger.error("Request %s cannot have its memory: %s", request, error, exc_info=unexpected)
