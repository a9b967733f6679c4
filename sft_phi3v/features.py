"""Image features that are made once and kept on disk: `feature_cache`.

Where vision tower and projector are frozen, a picture has the same features in every epoch. Before training they are
made once, and steps then read them instead of decoding the picture and computing CLIP:

    <feature_cache>/<key>/<name>.safetensors    "features", (image tokens of some pictures, hidden_size)
                                                metadata: the pictures' digests with their counts; a digest of it all

The key stands for all that the features are made with: weights, crops, precision. A picture is known by the digest of
its file, so that equal ones are kept once, and a later run on the same pictures finds them made. A file is written
aside and renamed under a name that its pictures give it: whoever is cut, or fills the same folder at the same time,
leaves whole files only. What goes into the model is the same to the last bit, up to the rounding that depends on how
many crops are computed at once.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, List, Value
from datasets import Features as Kinds
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from sft_phi3v.checkpoints import check_room, check_shared, flush
from sft_phi3v.data import ROW, Pictures, Reader, open_picture
from sft_phi3v.estimate import DTYPES, Setting, grid
from sft_phi3v.model import first_line
from sft_phi3v.phi3_v import SDPA_BY_ROW, Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from sft_phi3v.phi3_v.image_processing_phi3_v import CROP, num_image_tokens
from sft_phi3v.recipe import Recipe

VERSION = 1  # of how features are made: another one does not touch older files
SHARD_BYTES = 256 << 20  # about so many in one file: what a fill that is cut loses, at most, on each process
CROPS_AT_ONCE = 32
WORKERS = 4  # that decode, where the recipe does not say how many
FEW = 32  # pictures, for which it takes longer to start them
MEASURED = 4  # pictures on which costs are measured
STALE = 3600  # seconds after which a file that is written aside is nobody's

Example = dict[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """Rows, and their pictures as [`~sft_phi3v.data.check_rows`] knows them."""

    rows: Dataset
    pictures: Sequence[Pictures]


def distinct(pictures: Iterable[Pictures]) -> dict[bytes, Size]:
    """Width and height of each different picture, by its digest. Where only sizes are known, each is another one."""
    found: dict[bytes, Size] = {}
    for row in pictures:
        unknown = [str(len(found) + index).encode() for index in range(len(row.sizes))]
        found |= dict(zip(row.digests or unknown, row.sizes, strict=True))
    return found


def tokens_of(size: Size, num_crops: int) -> int:
    """Image features of a picture of this width and height."""
    return num_image_tokens(*grid(size, num_crops))


def cache_bytes(recipe: Recipe, config: Phi3VConfig, sizes: Mapping[bytes, Size], num_crops: int) -> int:
    """What the features of some pictures take on disk, known before a weight is loaded."""
    setting = Setting.of(recipe)
    own = str(config.dtype or "float32").removeprefix("torch.")
    width = 2 if setting.autocast else DTYPES[own if setting.dtype == "auto" else setting.dtype]
    return width * config.hidden_size * sum(tokens_of(size, num_crops) for size in sizes.values())


def break_even(*, made: float, written: float, read: float, share: float = 1.0) -> int | None:
    """
    The first epoch with which a cache pays.

    Args:
        made (`float`): Seconds that it takes to decode and compute a picture.
        written (`float`): Seconds that it takes to write its features.
        read (`float`): Seconds that it takes to read them.
        share (`float`, *optional*, defaults to `1.0`): Of the pictures, those that are not in the cache yet.

    Returns:
        `int` or `None`: `None` if it never does. n epochs cost share · (made + written) + n · read with the cache, and
        n · made without it.
    """
    return math.floor(share * (made + written) / (made - read)) + 1 if made > read else None


def verdict(first: int | None, epochs: float) -> str:
    """In words, whether a cache that pays from an epoch on pays in so many epochs."""
    planned = f"{epochs:.3g} epoch{'s' if epochs != 1 else ''}"
    if first is None:
        return "it does not pay: reading takes longer than computing. Remove `feature_cache`."
    if epochs >= first:
        return f"it pays from epoch {first} on, of {planned}."
    return (
        f"it does not pay with {planned}: it would from epoch {first} on. Remove `feature_cache`, unless other runs on "
        "these pictures follow, which find them made."
    )


class Features:
    """
    Reads image features, for the collator. Files are mapped into memory, by each process anew.

    Args:
        shards (sequence of `Path`): The files.
        places (`dict[bytes, tuple[int, int, int]]`):
            Of each picture, by its digest, the file's number, and where in it its features begin and end.
        num_crops (`int`): Most local crops of a picture.
    """

    def __init__(self, shards: Sequence[Path], places: Mapping[bytes, tuple[int, int, int]], num_crops: int):
        self.shards, self.places, self.num_crops = shards, places, num_crops
        self._process, self._open = 0, dict[int, Any]()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": 0, "_open": {}}

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples (`list[dict]`): From [`Examples`].

        Returns:
            `dict[str, torch.Tensor]`: `image_features`, `(image tokens, hidden_size)`, and `image_sizes`, int64
            `(pictures, 2)`, in the order of appearance; nothing where no example has a picture.
        """
        digests = [digest for example in examples for digest in example["digests"]]
        grids = [grid(image.size, self.num_crops) for example in examples for image in example["images"]]
        if not digests:
            return {}
        sizes = [(rows * CROP, columns * CROP) for rows, columns in grids]
        return {"image_features": torch.cat([self.of(one) for one in digests]), "image_sizes": torch.tensor(sizes)}

    def of(self, digest: bytes) -> torch.Tensor:
        """The features of one picture, `(image tokens, hidden_size)`; not to be written into."""
        if self._process != os.getpid():  # a fork shares its parent's maps, but not what is done to them later
            self._process, self._open = os.getpid(), {}
        shard, start, end = self.places[digest]
        if shard not in self._open:
            try:
                self._open[shard] = safe_open(self.shards[shard], "pt").get_slice("features")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"`feature_cache`: {self.shards[shard]} was there when this run began, and cannot be read now: "
                    f"{first_line(error)}. Start the same command again: it makes what is missing, and goes on."
                ) from error
        features: torch.Tensor = self._open[shard][start:end]
        return features


class Examples(TorchDataset[Example]):
    """
    Rows as examples whose pictures have a size and no pixels, and are known by their `digests`.

    Args:
        part ([`Part`]): The rows.
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `prompt`, `answer` and `image_column` are read.
    """

    def __init__(self, part: Part, recipe: Recipe):
        self.reader = Reader.of(part.rows, recipe)
        columns = [name for name in self.reader.columns if name != self.reader.column]
        self.rows = part.rows.select_columns([*columns, ROW]).with_format(None)
        known = {"digests": [one.digests for one in part.pictures], "sizes": [one.sizes for one in part.pictures]}
        kinds = Kinds({"digests": List(Value("binary")), "sizes": List(List(Value("int64")))})
        self.pictures = Dataset.from_dict(known, kinds)  # an Arrow table: workers get it without a copy

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row, found = self.rows[index], self.pictures[index]
        if self.reader.column:
            row[self.reader.column] = [{"width": width, "height": height} for width, height in found["sizes"]]
        return self.reader.example(row) | {"digests": found["digests"]}


class Crops(TorchDataset[dict[str, torch.Tensor]]):
    """
    Pictures as the vision tower reads them, each different one once.

    Args:
        parts (sequence of [`Part`]): Rows.
        wanted (collection of `bytes`): Digests; in this order.
        recipe ([`~sft_phi3v.recipe.Recipe`]): Says where in a row the pictures are.
        processor ([`Phi3VProcessor`]): Cuts them.
    """

    def __init__(self, parts: Sequence[Part], wanted: Iterable[bytes], recipe: Recipe, processor: Phi3VProcessor):
        self.readers = [Reader.of(part.rows, recipe) for part in parts]
        self.rows = [reader.undecoded(part.rows) for reader, part in zip(self.readers, parts, strict=True)]
        self.processor = processor.image_processor
        first: dict[bytes, tuple[int, int, int]] = {}
        for number, part in enumerate(parts):
            for index, row in enumerate(part.pictures):
                for position, digest in enumerate(row.digests):
                    first.setdefault(digest, (number, index, position))
        self.places = [first[digest] for digest in wanted]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, at, position = self.places[index]
        row = self.rows[number][at]
        try:
            cut = self.processor([open_picture(self.readers[number].pictures(row)[position])])
        except (OSError, ValueError) as error:
            raise ValueError(f"row {row[ROW]}: {error}") from error
        return {"pixel_values": cut["pixel_values"], "image_sizes": cut["image_sizes"]}


def together(crops: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pictures of [`Crops`] as one batch."""
    return {key: torch.cat([one[key] for one in crops]) for key in crops[0]}


class Cache:
    """
    The folder of one key, and what it takes to fill it.

    Args:
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `feature_cache` is the folder around it.
        model ([`Phi3VForCausalLM`]): On its device, as it will train.
        processor ([`Phi3VProcessor`]): Cuts pictures.
        parts (sequence of [`Part`]): Rows whose pictures' features are needed.
        precision (`AbstractContextManager`): What training computes under.

    Raises:
        ValueError: If the features would not stay the same.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Phi3VForCausalLM,
        processor: Phi3VProcessor,
        parts: Sequence[Part],
        *,
        precision: AbstractContextManager[Any],
    ):
        check_frozen(model)
        self.recipe, self.model, self.processor, self.parts, self.precision = recipe, model, processor, parts, precision
        self.num_crops: int = processor.image_processor.num_crops
        self.sizes = distinct(itertools.chain.from_iterable(part.pictures for part in parts))
        self.dtype = _kept(recipe, model)
        self.folder = Path(str(recipe.task.feature_cache)).expanduser() / self._key()
        self.written = 0.0  # seconds that files took, on this process

    def _key(self) -> str:
        """Stands for all that the features are made with."""
        inner, images, training = self.model.model, self.processor.image_processor, self.recipe.training
        vision = inner.vision_tower.config
        numbers = [VERSION, self.num_crops, images.image_mean, images.image_std, inner.vision_layers]
        attention = vision._attn_implementation
        attention = "sdpa" if attention == SDPA_BY_ROW else attention  # which here is the same: crops are no rows
        numbers += [vision.num_attention_heads, vision.hidden_act, vision.layer_norm_eps, attention]
        numbers += [bool(training.bf16), bool(training.fp16), self.dtype]
        digest = hashlib.blake2b(json.dumps(numbers, default=str).encode(), digest_size=12)
        for part in (inner.vision_tower, inner.multi_modal_projector):
            for name, weight in part.state_dict().items():
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(_bytes(weight))
        return digest.hexdigest()

    def bytes_of(self, digests: Iterable[bytes]) -> int:
        """What the features of these pictures take."""
        width: int = self.dtype.itemsize * self.model.config.hidden_size
        return width * sum(tokens_of(self.sizes[digest], self.num_crops) for digest in digests)

    def missing(self) -> list[bytes]:
        """
        The pictures that no whole file holds. Damaged files are removed. All processes have to call, and get the same.
        """
        state = PartialState()
        [names] = broadcast_object_list([sorted(path.name for path in self.folder.glob("*.safetensors"))])
        own = [self.folder / name for name in names[state.process_index :: state.num_processes]]
        with ThreadPoolExecutor(WORKERS) as threads:  # digests are made without Python's lock
            found = [*zip(own, threads.map(self._damage, own), strict=True)]
        for path, problem in found:
            if problem is not None:
                print(f"feature_cache: {path} is damaged, and made again: {problem}", flush=True)
                path.unlink(missing_ok=True)
        there = [digest for path, problem in found if problem is None for digest, _ in read_pictures(path)]
        known = {*(gather_object(there) if state.num_processes > 1 else there)}
        [wanted] = broadcast_object_list([[digest for digest in self.sizes if digest not in known]])
        return list(wanted)

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a file, in words; files without a needed picture are not looked at."""
        try:
            if not any(digest in self.sizes for digest, _ in read_pictures(path)):
                return None
            with safe_open(path, "pt") as file:
                said, features = file.metadata(), file.get_tensor("features")
            return None if said == _metadata(read_pictures(path), features) else "its bytes have changed"
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            return first_line(error)

    def plan(self, missing: Sequence[bytes]) -> list[list[bytes]]:
        """The files to be made: the pictures of each."""
        return _portions(missing, lambda digest: self.bytes_of([digest]), SHARD_BYTES)

    def fill(self, files: Sequence[Sequence[bytes]]) -> None:
        """
        Makes files, each process its share, and waits for those of the others.

        Args:
            files (sequence of sequences of `bytes`): From [`Cache.plan`].

        Raises:
            ValueError: If a picture cannot be read, or a file cannot be written.
        """
        state, device = PartialState(), self.model.device
        own = files[state.process_index :: state.num_processes]
        wanted = [digest for file in own for digest in file]
        positions = itertools.count()
        batches = [[next(positions) for _ in some] for file in own for some in self._batches(file)]
        crops = iter(
            DataLoader(
                Crops(self.parts, wanted, self.recipe, self.processor),
                batch_sampler=batches,
                collate_fn=together,
                num_workers=self._workers(len(wanted)),
            )
        )
        quiet = bool(self.recipe.training.disable_tqdm) or not state.is_main_process
        with tqdm(total=sum(map(len, files)), desc="image features", unit=" pictures", disable=quiet) as bar:
            for file in own:
                made = []
                for some in self._batches(file):
                    batch = next(crops)
                    made.append(self.compute(batch["pixel_values"].to(device), batch["image_sizes"]))
                    bar.update(min(len(some) * state.num_processes, bar.total - bar.n))
                self._write(file, torch.cat(made))
        for file in files:  # not by a barrier, whose time-out a slow disk would meet
            while not self._path(file).exists():
                time.sleep(0.2)
        state.wait_for_everyone()

    def compute(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Image features as they are kept: of [`Phi3VModel.get_image_features`], on the CPU."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.precision:
            features = self.model.get_image_features(pixel_values, image_sizes)
        self.model.train(was_training)
        return features.to(self.dtype).cpu()

    def _batches(self, file: Sequence[bytes]) -> list[list[bytes]]:
        """The pictures of a file, some at a time."""
        return _portions(file, lambda one: math.prod(grid(self.sizes[one], self.num_crops)) + 1, CROPS_AT_ONCE)

    def _workers(self, pictures: int) -> int:
        cores = (os.cpu_count() or 1) // PartialState().num_processes
        return 0 if pictures < FEW else min(self.recipe.training.dataloader_num_workers or WORKERS, max(1, cores))

    def _path(self, file: Sequence[bytes]) -> Path:
        return self.folder / f"{hashlib.blake2b(b''.join(file), digest_size=16).hexdigest()}.safetensors"

    def _write(self, file: Sequence[bytes], features: torch.Tensor) -> None:
        start, path = time.perf_counter(), self._path(file)
        counts = [tokens_of(self.sizes[digest], self.num_crops) for digest in file]
        metadata = _metadata([*zip(file, counts, strict=True)], features)
        aside = path.with_name(f".{path.stem}.{socket.gethostname()}.{os.getpid()}")
        try:
            save_file({"features": features}, aside, metadata)
            flush(aside)
            os.replace(aside, path)
            flush(self.folder)
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            raise ValueError(f"`feature_cache`: {path} cannot be written: {first_line(error)}") from error
        self.written += time.perf_counter() - start

    def open(self) -> Features:
        """What reads the features. Their files are looked for anew: another machine may have made them."""
        shards = sorted(self.folder.glob("*.safetensors"))
        places: dict[bytes, tuple[int, int, int]] = {}
        for number, path in enumerate(shards):
            start = 0
            for digest, count in read_pictures(path):
                if digest in self.sizes:
                    places[digest] = (number, start, start + count)
                start += count
        if missing := len(self.sizes.keys() - places.keys()):
            raise ValueError(f"`feature_cache`: {self.folder} lacks {missing} pictures: did someone remove files?")
        return Features(shards, places, self.num_crops)

    def measure(self, features: Features) -> tuple[float, float]:
        """Seconds per picture: to decode and compute it, and to read its features from the disk; on a few pictures."""
        some = [*self.sizes][:: max(1, len(self.sizes) // MEASURED)][:MEASURED]
        crops = Crops(self.parts, some, self.recipe, self.processor)

        def make(index: int) -> None:
            batch = crops[index]
            self.compute(batch["pixel_values"].to(self.model.device), batch["image_sizes"])

        make(0)  # whatever comes first takes longer
        start = time.perf_counter()
        for index in range(len(some)):
            make(index)
        made = time.perf_counter() - start
        for path in {features.shards[features.places[digest][0]] for digest in some}:
            _forget(path)
        start = time.perf_counter()
        for digest in some:
            features.of(digest).clone()
        return made / len(some), (time.perf_counter() - start) / len(some)


def cached(
    recipe: Recipe,
    model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    parts: Sequence[Part],
    *,
    precision: AbstractContextManager[Any],
    epochs: float,
    say: Callable[[str], None],
) -> Features:
    """
    Makes the image features that are not in `feature_cache` yet; all processes have to call.

    Args:
        recipe ([`~sft_phi3v.recipe.Recipe`]): Its `feature_cache` is the folder.
        model ([`Phi3VForCausalLM`]): On its device, as it will train.
        processor ([`Phi3VProcessor`]): Cuts pictures.
        parts (sequence of [`Part`]): Rows whose pictures' features are needed.
        precision (`AbstractContextManager`): What training computes under.
        epochs (`float`): How long training is planned to be.
        say (`Callable`): Shows a line, on one process.

    Returns:
        [`Features`]: What reads them.

    Raises:
        ValueError: If the features would not stay the same, there is no room for them, or machines do not share the
            folder.
    """
    cache = Cache(recipe, model, processor, parts, precision=precision)
    if not cache.sizes:
        return Features([], {}, cache.num_crops)
    _once(partial(_make, cache.folder))
    check_shared(cache.folder, key="feature_cache")
    missing = cache.missing()
    needed = cache.bytes_of(missing) + 100 * len(missing)  # and a line of JSON for each
    what = f"what is kept of {len(missing):,} pictures"
    _once(partial(check_room, cache.folder, needed, what, key="feature_cache"))
    start = time.perf_counter()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):  # what is made or found, a run trains to the same weights
        if missing:
            cache.fill(cache.plan(missing))
    filled = time.perf_counter() - start
    features = cache.open()
    made, read = cache.measure(features) if PartialState().is_main_process else (0.0, 0.0)
    total = cache.bytes_of(cache.sizes)
    share = len(missing) / len(cache.sizes)
    written = cache.written * PartialState().num_processes / max(len(missing), 1)
    first = break_even(made=made, written=written, read=read, share=share)
    say(
        f"feature_cache: {len(cache.sizes):,} pictures, {total / 1e9:,.2f} GB in {cache.folder}; {len(missing):,} made "
        f"in {filled:,.1f} s\n  a picture takes {1000 * made:,.1f} ms to decode and compute, and {1000 * read:,.1f} ms "
        f"to read back: {verdict(first, epochs)}\n"
    )
    return features


def check_frozen(model: Phi3VForCausalLM) -> None:
    """
    Refuses a model whose image features change while it trains.

    Args:
        model ([`Phi3VForCausalLM`]): As it will train.

    Raises:
        ValueError: If any weight of vision tower or projector is trained, or the tower drops out at random.
    """
    for part in ("vision_tower", "multi_modal_projector"):
        for name, weight in model.model.get_submodule(part).named_parameters():
            if weight.requires_grad:
                raise ValueError(
                    f"`feature_cache`: {part}.{name} is trained, and image features change with it. Remove "
                    "`feature_cache`, or train the language model alone (`use_peft`, `adapt`, `lora_modules_to_save`)."
                )
    if model.model.vision_tower.config.attention_dropout:
        raise ValueError("`feature_cache`: this vision tower has `attention_dropout`. Remove `feature_cache`.")


def read_pictures(path: Path) -> list[tuple[bytes, int]]:
    """The pictures of a file, in order, with their counts of features; read from its head."""
    with safe_open(path, "pt") as file:
        pictures = json.loads(file.metadata()["kept"])["pictures"]
    return [(bytes.fromhex(digest), count) for digest, count in pictures]


def _kept(recipe: Recipe, model: Phi3VForCausalLM) -> torch.dtype:
    """
    The dtype in which nothing is lost. The model turns features into the embeddings' dtype: if that is the wider one,
    which holds every number of the narrower, it still can when they are read.
    """
    training, placed = recipe.training, model.get_input_embeddings().weight.dtype
    computed = model.model.multi_modal_projector.linear_2.weight.dtype
    if training.bf16 or training.fp16:
        computed = torch.float16 if training.fp16 else torch.bfloat16
    return computed if computed.itemsize < placed.itemsize else placed


def _portions(digests: Sequence[bytes], cost: Callable[[bytes], int], most: int) -> list[list[bytes]]:
    """In the same order, as many together as cost no more than `most`, and one at least."""
    portions: list[list[bytes]] = []
    size = 0
    for digest in digests:
        more = cost(digest)
        if not portions or size + more > most:
            portions.append([])
            size = 0
        portions[-1].append(digest)
        size += more
    return portions


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _metadata(pictures: Sequence[tuple[bytes, int]], features: torch.Tensor) -> dict[str, str]:
    """What stands in a file beside the features. One key: several would be written in any order."""
    named = [[digest.hex(), count] for digest, count in pictures]
    digest = hashlib.blake2b(json.dumps(named).encode(), digest_size=16)
    digest.update(_bytes(features))
    return {"kept": json.dumps({"digest": digest.hexdigest(), "pictures": named})}


def _once(act: Callable[[], None]) -> None:
    """Does something on process 0, and raises its `ValueError` on all."""
    problem = [""]
    if PartialState().is_main_process:
        try:
            act()
        except ValueError as error:
            problem = [str(error)]
    if said := broadcast_object_list(problem)[0]:
        raise ValueError(said)


def _make(folder: Path) -> None:
    """Makes a folder. What a fill that was cut left half written in it goes; what is being written now is younger."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`feature_cache` is {str(folder.parent)!r}, which cannot be written: {error}") from error
    for path in folder.glob(".*"):
        with contextlib.suppress(FileNotFoundError):  # its writer may have renamed it meanwhile
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()


def _forget(path: Path) -> None:
    """Has the system read a file from the disk again, as it must where features are more than memory holds."""
    if sys.platform != "linux":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
