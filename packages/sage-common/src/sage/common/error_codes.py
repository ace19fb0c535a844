"""Find the class of an error by its code, for errors that were received over HTTP or stored as an engine's failure."""

from collections.abc import Mapping

from sage.common import errors
from sage.common.errors import SageError

#: Error codes of each class. A test compares this table with the errors that SAGE's code raises.
_CODES: Mapping[type[SageError], str] = {
    errors.ConfigError: """
        adapter_not_hot api_key_invalid api_key_needed bitsandbytes_missing change_refused checkpoint_mismatch
        config_invalid config_missing context_length_exceeded database_elsewhere database_newer database_unusable
        fork_refused host_not_allowed invalid_value model_required option_missing origin_not_allowed path_not_absolute
        reward_file_unusable reward_files_off
        settings_invalid state_folder_unusable target_modules_unknown too_few_gpus trl_missing unsupported_value
        tracker_missing cursor_unknown package_missing backend_not_installed backend_unusable
        file_ids_unsupported systemd_missing""",
    errors.DatasetError: """
        dataset_changed dataset_empty dataset_invalid dataset_template dataset_too_long dataset_unusable
        dataset_warnings line_not_found no_answers nothing_to_train""",
    errors.ModelError: """
        adapter_not_finite adapter_unfit base_changed base_is_adapter export_failed export_unsupported model_invalid
        model_unsupported model_unusable no_adapter template_too_slow tokenizer_missing tokenizer_slow
        tokenizer_too_large""",
    errors.ModelNotFound: "base_model_not_found model_not_found",
    errors.NotFound: """
        checkpoint_not_found engine_not_found task_not_found model_not_found route_not_found
        service_not_installed""",
    errors.OutputError: "output_unavailable output_unusable",
    errors.Conflict: """
        already_running backend_in_use backup_exists busy dataset_changed disk_too_small gateway_running home_in_use
        home_not_empty model_exists no_port not_pausable not_resumable not_started not_queued not_training run_completed
        other_node port_taken still_running""",
    errors.RunError: """
        checkpoint_damaged disk_full file_unusable loss_exploded loss_not_finite model_too_large out_of_memory
        training_failed""",
    errors.EngineError: """
        adapter_load_failed adapter_refused device_not_found engine_died engine_unreadable engine_unusable gateway_stuck
        killed launch_failed sleep_failed memory_busy memory_too_small run_unreadable service_failed start_timeout stream_cut
        worker_died""",
    errors.BackendError: "backend_install_failed disk_full index_unreachable",
    errors.BackupError: "backup_damaged backup_not_found disk_full folder_not_replaceable",
    errors.Overloaded: """
        database_error engine_ended engine_paused engine_starting engine_stopping engine_unresponsive out_of_memory standby
        too_many_connections too_many_requests""",
    errors.Busy: "engine_busy",
    errors.Unauthorized: "invalid_api_key",
}
_CLASSES: Mapping[str, list[type[SageError]]] = {
    code: [kind for kind, codes in _CODES.items() if code in codes.split()]
    for codes in _CODES.values()
    for code in codes.split()
}
_BY_STATUS: Mapping[int, type[SageError]] = {
    kind.http_status: kind
    for kind in (
        errors.Unauthorized,
        errors.NotFound,
        errors.Conflict,
        errors.EngineError,
        errors.Overloaded,
        errors.Busy,
    )
}


def codes_of(kind: type[SageError]) -> frozenset[str]:
    """Return the codes that an error class uses."""
    return frozenset(_CODES.get(kind, "").split())


def error_class(code: str, http_status: int | None = None) -> type[SageError]:
    """Return the error class that uses a code.

    If the code is unknown or several classes use the code, the HTTP status selects the class.
    """
    kinds = _CLASSES.get(code, [])
    same_status = [kind for kind in kinds if kind.http_status == http_status]
    if found := same_status or kinds:
        return found[0]
    return _BY_STATUS.get(http_status or 0, SageError)
