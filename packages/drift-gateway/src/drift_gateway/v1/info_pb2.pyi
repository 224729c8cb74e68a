from drift_gateway.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Readiness(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    READINESS_UNSPECIFIED: _ClassVar[Readiness]
    READINESS_STARTING: _ClassVar[Readiness]
    READINESS_READY: _ClassVar[Readiness]
    READINESS_RESTARTING: _ClassVar[Readiness]
    READINESS_STOPPING: _ClassVar[Readiness]
    READINESS_DRAINING: _ClassVar[Readiness]

class Sharing(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHARING_UNSPECIFIED: _ClassVar[Sharing]
    SHARING_IDLE: _ClassVar[Sharing]
    SHARING_SPATIAL: _ClassVar[Sharing]
    SHARING_TEMPORAL: _ClassVar[Sharing]
    SHARING_FUSED: _ClassVar[Sharing]
    SHARING_EXCLUSIVE: _ClassVar[Sharing]
READINESS_UNSPECIFIED: Readiness
READINESS_STARTING: Readiness
READINESS_READY: Readiness
READINESS_RESTARTING: Readiness
READINESS_STOPPING: Readiness
READINESS_DRAINING: Readiness
SHARING_UNSPECIFIED: Sharing
SHARING_IDLE: Sharing
SHARING_SPATIAL: Sharing
SHARING_TEMPORAL: Sharing
SHARING_FUSED: Sharing
SHARING_EXCLUSIVE: Sharing

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "readiness", "start_up", "model", "device", "policies", "kv_pool", "slo_defaults", "engine_restarts", "gateway", "gateways")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    READINESS_FIELD_NUMBER: _ClassVar[int]
    START_UP_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    KV_POOL_FIELD_NUMBER: _ClassVar[int]
    SLO_DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    version: str
    readiness: Readiness
    start_up: StartUp
    model: Model
    device: Device
    policies: Policies
    kv_pool: KvPool
    slo_defaults: _generation_pb2.SLO
    engine_restarts: int
    gateway: int
    gateways: int
    def __init__(self, version: _Optional[str] = ..., readiness: _Optional[_Union[Readiness, str]] = ..., start_up: _Optional[_Union[StartUp, _Mapping]] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., device: _Optional[_Union[Device, _Mapping]] = ..., policies: _Optional[_Union[Policies, _Mapping]] = ..., kv_pool: _Optional[_Union[KvPool, _Mapping]] = ..., slo_defaults: _Optional[_Union[_generation_pb2.SLO, _Mapping]] = ..., engine_restarts: _Optional[int] = ..., gateway: _Optional[int] = ..., gateways: _Optional[int] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class ListPluginsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPluginsResponse(_message.Message):
    __slots__ = ("plugins",)
    PLUGINS_FIELD_NUMBER: _ClassVar[int]
    plugins: _containers.RepeatedCompositeFieldContainer[Plugin]
    def __init__(self, plugins: _Optional[_Iterable[_Union[Plugin, _Mapping]]] = ...) -> None: ...

class Plugin(_message.Message):
    __slots__ = ("kind", "name", "package", "version", "summary")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    package: str
    version: str
    summary: str
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ..., package: _Optional[str] = ..., version: _Optional[str] = ..., summary: _Optional[str] = ...) -> None: ...

class StartUp(_message.Message):
    __slots__ = ("phase", "fraction")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    phase: str
    fraction: float
    def __init__(self, phase: _Optional[str] = ..., fraction: _Optional[float] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "vocab_size", "max_context_tokens", "num_layers", "dtype", "has_tokenizer", "has_chat_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    vocab_size: int
    max_context_tokens: int
    num_layers: int
    dtype: str
    has_tokenizer: bool
    has_chat_template: bool
    def __init__(self, name: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_context_tokens: _Optional[int] = ..., num_layers: _Optional[int] = ..., dtype: _Optional[str] = ..., has_tokenizer: _Optional[bool] = ..., has_chat_template: _Optional[bool] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("name", "units", "partition_menu")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    PARTITION_MENU_FIELD_NUMBER: _ClassVar[int]
    name: str
    units: int
    partition_menu: _containers.RepeatedCompositeFieldContainer[Partition]
    def __init__(self, name: _Optional[str] = ..., units: _Optional[int] = ..., partition_menu: _Optional[_Iterable[_Union[Partition, _Mapping]]] = ...) -> None: ...

class Partition(_message.Message):
    __slots__ = ("prefill_units", "decode_units")
    PREFILL_UNITS_FIELD_NUMBER: _ClassVar[int]
    DECODE_UNITS_FIELD_NUMBER: _ClassVar[int]
    prefill_units: int
    decode_units: int
    def __init__(self, prefill_units: _Optional[int] = ..., decode_units: _Optional[int] = ...) -> None: ...

class Policies(_message.Message):
    __slots__ = ("dispatch", "partition")
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    dispatch: str
    partition: str
    def __init__(self, dispatch: _Optional[str] = ..., partition: _Optional[str] = ...) -> None: ...

class KvPool(_message.Message):
    __slots__ = ("page_tokens", "total_pages", "total_tokens", "max_running")
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_PAGES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    page_tokens: int
    total_pages: int
    total_tokens: int
    max_running: int
    def __init__(self, page_tokens: _Optional[int] = ..., total_pages: _Optional[int] = ..., total_tokens: _Optional[int] = ..., max_running: _Optional[int] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("load",)
    LOAD_FIELD_NUMBER: _ClassVar[int]
    load: Load
    def __init__(self, load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("in_flight", "max_in_flight", "waiting", "running", "free_pages", "tokens_generated", "requests_finished", "preemptions", "waiting_prefill_tokens", "total_pages", "prompt_tokens", "cached_tokens")
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_GENERATED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    WAITING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_PAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    in_flight: int
    max_in_flight: int
    waiting: int
    running: int
    free_pages: int
    tokens_generated: int
    requests_finished: int
    preemptions: int
    waiting_prefill_tokens: int
    total_pages: int
    prompt_tokens: int
    cached_tokens: int
    def __init__(self, in_flight: _Optional[int] = ..., max_in_flight: _Optional[int] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., free_pages: _Optional[int] = ..., tokens_generated: _Optional[int] = ..., requests_finished: _Optional[int] = ..., preemptions: _Optional[int] = ..., waiting_prefill_tokens: _Optional[int] = ..., total_pages: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class ClassStats(_message.Message):
    __slots__ = ("finished", "ttft_attainment", "tbt_attainment", "ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms", "ttft_target_ms", "tbt_target_ms", "goodput")
    CLASS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    TTFT_ATTAINMENT_FIELD_NUMBER: _ClassVar[int]
    TBT_ATTAINMENT_FIELD_NUMBER: _ClassVar[int]
    TTFT_P50_MS_FIELD_NUMBER: _ClassVar[int]
    TTFT_P99_MS_FIELD_NUMBER: _ClassVar[int]
    TBT_P50_MS_FIELD_NUMBER: _ClassVar[int]
    TBT_P99_MS_FIELD_NUMBER: _ClassVar[int]
    TTFT_TARGET_MS_FIELD_NUMBER: _ClassVar[int]
    TBT_TARGET_MS_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_FIELD_NUMBER: _ClassVar[int]
    finished: int
    ttft_attainment: float
    tbt_attainment: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tbt_p50_ms: float
    tbt_p99_ms: float
    ttft_target_ms: float
    tbt_target_ms: float
    goodput: float
    def __init__(self, finished: _Optional[int] = ..., ttft_attainment: _Optional[float] = ..., tbt_attainment: _Optional[float] = ..., ttft_p50_ms: _Optional[float] = ..., ttft_p99_ms: _Optional[float] = ..., tbt_p50_ms: _Optional[float] = ..., tbt_p99_ms: _Optional[float] = ..., ttft_target_ms: _Optional[float] = ..., tbt_target_ms: _Optional[float] = ..., goodput: _Optional[float] = ..., **kwargs) -> None: ...

class WatchStatsRequest(_message.Message):
    __slots__ = ("interval_ms",)
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    def __init__(self, interval_ms: _Optional[int] = ...) -> None: ...

class WatchStatsResponse(_message.Message):
    __slots__ = ("time_us", "load", "stretches", "dropped", "classes")
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STRETCHES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    time_us: int
    load: Load
    stretches: _containers.RepeatedCompositeFieldContainer[Stretch]
    dropped: int
    classes: _containers.RepeatedCompositeFieldContainer[ClassStats]
    def __init__(self, time_us: _Optional[int] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., stretches: _Optional[_Iterable[_Union[Stretch, _Mapping]]] = ..., dropped: _Optional[int] = ..., classes: _Optional[_Iterable[_Union[ClassStats, _Mapping]]] = ...) -> None: ...

class Stretch(_message.Message):
    __slots__ = ("start_us", "stop_us", "sharing", "partition", "prefill_requests", "decode_requests")
    START_US_FIELD_NUMBER: _ClassVar[int]
    STOP_US_FIELD_NUMBER: _ClassVar[int]
    SHARING_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    DECODE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    start_us: int
    stop_us: int
    sharing: Sharing
    partition: Partition
    prefill_requests: int
    decode_requests: int
    def __init__(self, start_us: _Optional[int] = ..., stop_us: _Optional[int] = ..., sharing: _Optional[_Union[Sharing, str]] = ..., partition: _Optional[_Union[Partition, _Mapping]] = ..., prefill_requests: _Optional[int] = ..., decode_requests: _Optional[int] = ...) -> None: ...
