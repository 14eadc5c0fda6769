"""A run directory: runs its stages, keeps finished ones, and refuses those that were made with other settings."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard, get_args

import omegaconf

from nemo_srl import lineage, models, shared_storage, worker
from nemo_srl.artifacts import Artifact, BaseModel, Model, Schema, SourceFile, to_line, write_atomic
from nemo_srl.config import Config, Role
from nemo_srl.engines import EngineBackend, EngineSize, engine_backend, services
from nemo_srl.errors import ConfigError, DataError, JobFailedError
from nemo_srl.judging import reader
from nemo_srl.launchers import launcher_backend, open_launcher
from nemo_srl.locks import DirectoryLock
from nemo_srl.models import hf
from nemo_srl.protocols import Job, JobStep, Service
from nemo_srl.records import R
from nemo_srl.stages.base import A, Input, Need, Stage
from nemo_srl.trainers import TrainerBackend, trainer_backend

log = logging.getLogger(__name__)

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class Experiment:
    """Runs stages in a run directory. Use it as a context manager: it locks the directory for one orchestrator."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.run_dir = Path(cfg.run_dir).absolute()
        worker.set_up(cfg)
        engine_nodes = max(_size(cfg.engine_for(role)).num_nodes for role in get_args(Role))
        num_nodes = {"trainer.num_nodes": cfg.trainer.num_nodes, "engine.num_nodes": engine_nodes}
        launcher_backend(cfg.launcher).check(num_nodes)
        if cfg.judge.rubric != omegaconf.MISSING:
            reader(cfg.judge).check(cfg.judge)
        self._launcher = open_launcher(cfg.launcher, cfg.cluster)
        self._close_launcher = partial(launcher_backend(cfg.launcher).close, self._launcher)
        self._lock = DirectoryLock(
            self.run_dir / ".lock",
            busy=f"run_dir={self.run_dir}: another orchestrator uses it ({{owner}}). Wait for it, end it, or use "
            "another run_dir.",
        )
        self._outside: set[Path] = set()
        """Directories outside the run directory that stages read, and those to which their links lead. All jobs see all
        of them, so that a job with servers can run the steps of any stage."""

    def __enter__(self) -> Experiment:
        self._lock.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._close_launcher()
        finally:
            self._lock.__exit__(kind, e, tb)

    def base_model(self, path: str = "", *, key: str = "model.path") -> BaseModel:
        """M0, or another model of the user. It is checked, and downloaded if this package knows its name.

        `key` is the setting that names it.
        """
        cache_dir = Path(self.cfg.model.cache_dir).expanduser()
        model_dir = models.resolve(path or self.cfg.model.path, cache_dir, key=key)
        self._outside |= set(shared_storage.directories_of(model_dir))
        return BaseModel(model_dir, hf.digest(model_dir))

    def source(self, path: str, record: type[R], *, key: str = "") -> SourceFile[R]:
        """A file of the user. It is read once here, so that a malformed line is found before any work starts.

        `key` is the setting that names it.
        """
        source = SourceFile(self.path_of(path, key=key), record)
        try:
            source.read()
        except DataError as e:
            raise DataError(f"{key}={e}" if key else str(e)) from e
        return source

    def path_of(self, path: str, *, key: str = "") -> Path:
        """The absolute path of a file of the user, which may also start at the project root. Raises `DataError`."""
        places = (Path(path), PROJECT_ROOT / path)
        found = next((p for p in places if p.is_file()), None)
        if found is None:
            what = "it is a directory" if any(p.is_dir() for p in places) else "no such file"
            raise DataError(
                f"{f'{key}={path!r}' if key else path}: {what}, in this directory or in {PROJECT_ROOT}. Give the path "
                "of a file."
            )
        file = found.absolute()
        if not file.is_relative_to(self.run_dir):
            self._outside |= set(shared_storage.directories_of(file))
        return file

    def given(self, name: str, records: Sequence[R], record: type[R]) -> SourceFile[R]:
        """Records that no stage made, as the file `run_dir/given/<name>.jsonl`, which stages can read."""
        path = self.run_dir / "given" / f"{name}.jsonl"
        write_atomic(path, "".join(map(to_line, records)))
        return self.source(str(path), record)

    def run(
        self,
        stage: Stage[A],
        iteration: int,
        *,
        directory: str = "",
        small: bool = False,
        **inputs: Input | Sequence[Input] | None,
    ) -> A:
        """The stage's artifact. It is kept if the run directory has it, and made otherwise.

        Its directory is `run_dir/iter_XX/<directory>`, by default with the name of the stage. `small` says that the
        stage asks its model little, and that no large work follows with that model: few replicas are enough. Raises
        `InputError` for inputs that the stage does not take, `StaleArtifactError` when another artifact is in its
        place, and `JobFailedError` when the stage fails. A stage without engines and distributed steps runs in this
        process.
        """
        given = stage.inputs(inputs)
        name = f"iter_{iteration:02d}/{directory or stage.name}"
        output = stage.output(self.run_dir / name, self._identity(stage, iteration, given))
        lineage.forget_begun(output.path)
        if output.is_published(self._schema(stage)):
            log.info("%-22s kept", name)
            return output
        log.info("%-22s ...", name)
        started = time.monotonic()
        worker.describe(stage, self.cfg, iteration, given, output)
        if stage.engines or stage.distributed:
            self._launcher.run(self._job(stage, name.replace("/", "-"), output, given, small=small))
        else:
            worker.run_steps(output.path, [s.name for s in stage.steps])
        # A cluster's job of an earlier start may have published it, with other settings.
        is_published = partial(output.is_published, self._schema(stage))
        shared_storage.appears(is_published, output.path, launcher_backend(self.cfg.launcher).visible_seconds)
        found = output.manifest() if is_published() else None
        if found is None:
            raise JobFailedError(
                f"{name} ended without publishing {output.path}. Its output is in {self.run_dir / 'logs'}. The next "
                "start runs this stage again, and all finished stages stay."
            )
        figures = "  ".join(f"{k} {v:.4g}" for k, v in found.metrics.items())
        log.info("%-22s %.0f s  %s", name, time.monotonic() - started, figures)
        return output

    def _identity(self, stage: Stage[Any], iteration: int, inputs: Mapping[str, Input]) -> dict[str, Any]:
        chosen = _chosen(_flatten(asdict(self.cfg)), stage.settings)
        for section, settings, backend in self._backends(stage):
            chosen |= _flatten({name: getattr(settings, name) for name in ("name", *backend.decisive)}, f"{section}.")
            if isinstance(backend, TrainerBackend):
                chosen[f"{section}.version"] = backend.version
        digests = {f"input {name}": x.digest() for name, x in inputs.items()}
        return {"stage": stage.name, "version": stage.version, "iteration": iteration, **chosen, **digests}

    def _schema(self, stage: Stage[Any]) -> Schema:
        """How an older run directory may differ: settings that it does not know, and old names."""
        defaults = {"version": 1, **_chosen(_flatten(asdict(Config())), stage.settings)}
        defaults |= _chosen(_flatten(asdict(self.cfg)), stage.added)
        renamed = {
            f"input {need.formerly}": f"input {name}"
            for name, need in stage.needs.items()
            if isinstance(need, Need) and need.formerly
        }
        for section, settings, backend in self._backends(stage):
            decisive = [f for f in fields(settings) if f.name in backend.decisive and f.default is not MISSING]
            defaults |= {f"{section}.{f.name}": f.default for f in decisive}
            renamed |= {f"{section}.{old}": f"{section}.{new}" for old, new in backend.formerly.items()}
            if isinstance(backend, TrainerBackend):
                defaults[f"{section}.version"] = 1
        return Schema(defaults, renamed)

    def _backends(self, stage: Stage[Any]) -> list[tuple[str, Any, EngineBackend | TrainerBackend]]:
        """The backends that decide the stage's result, each after its section and its settings."""
        found: list[tuple[str, Any, EngineBackend | TrainerBackend]] = []
        for role in stage.engines:
            engine = self.cfg.engine_for(role)
            section = "engine" if engine is self.cfg.engine else f"{role}.engine"
            found.append((section, engine, engine_backend(engine)))
        if stage.distributed:
            found.append(("trainer", self.cfg.trainer, trainer_backend(self.cfg.trainer)))
        return found

    def _services(self, stage: Stage[Any], inputs: Mapping[str, Input], *, small: bool) -> list[Service]:
        """The servers of the stage's engines, with its model. Roles with the same engine share them.

        They depend on nothing else of the stage, beside their number if it is `small`. So a launcher can keep them for
        the next stage that asks this model.
        """
        found: list[Service] = []
        for i, cfg in enumerate(engines := [self.cfg.engine_for(role) for role in stage.engines]):
            if cfg not in engines[:i]:
                model = inputs[stage.model]
                assert isinstance(model, (Model, BaseModel))
                all_of_it = services(cfg, model.model_dir.absolute(), self.run_dir / "servers")
                found += all_of_it[: _size(cfg).num_replicas_small or None] if small else all_of_it
        if len({s.name for s in found}) < len(found):
            raise ConfigError(
                f"stage {stage.name}: the engines of its roles {', '.join(stage.engines)} differ, but would start "
                "servers with the same names. Use `engine` for all of them."
            )
        return found

    def _job(self, stage: Stage[Any], name: str, output: Artifact, inputs: Mapping[str, Input], *, small: bool) -> Job:
        distributed, trainer = stage.distributed, self.cfg.trainer
        servers = self._services(stage, inputs, small=small)
        num_nodes = trainer.num_nodes if distributed else 1 + max((s.node for s in servers), default=0)
        num_ranks = trainer.num_ranks_per_node if distributed else 1
        served = max(sum(s.num_gpus for s in servers if s.node == node) for node in range(num_nodes))
        sizes = [_size(self.cfg.engine_for(role)) for role in stage.engines]
        in_process = max((s.gpus_per_replica for s in sizes if s.in_process), default=0)
        # Directories outside the run directory that the stage reads, and those to which their links lead.
        given = [x.model_dir if isinstance(x, BaseModel) else x.path for x in inputs.values() if _is_given(x)]
        outside = self._outside | {directory for path in given for directory in shared_storage.directories_of(path)}
        return Job(
            name=name,
            steps=self._job_steps(stage, output),
            log_dir=self.run_dir / "logs",
            stage=stage.name,
            role="trainer" if distributed else "engine",
            paths=[self.run_dir, *sorted(outside)],
            num_nodes=num_nodes,
            num_ranks_per_node=num_ranks,
            num_gpus_per_node=num_ranks if distributed else served or in_process,
            services=servers,
        )

    def _job_steps(self, stage: Stage[Any], output: Artifact) -> list[JobStep]:
        """One process per step and rank. With one rank, one process runs all steps, because imports take seconds."""
        command = ["-m", "nemo_srl.worker", str(output.path)]
        names = [s.name for s in stage.steps]
        if self.cfg.trainer.world_size == 1:
            return [JobStep(name=", ".join(names), command=[*command, *names])]
        return [JobStep(name=s.name, command=[*command, s.name], distributed=s.distributed) for s in stage.steps]


def _is_given(x: Input) -> TypeGuard[BaseModel | SourceFile[Any]]:
    """Whether it is the user's, and lies outside the run directory."""
    return isinstance(x, BaseModel | SourceFile)


def _size(engine: Any) -> EngineSize:
    return engine_backend(engine).size(engine)


def _chosen(settings: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """The flat `settings` that are at or below one of the dotted `paths`."""
    return {k: v for k, v in settings.items() if any(k == path or k.startswith(f"{path}.") for path in paths)}


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, child in value.items():
        flat |= _flatten(child, f"{prefix}{name}.") if isinstance(child, dict) else {prefix + name: child}
    return flat
