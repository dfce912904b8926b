"""What `compress` finds in its way or has done already: files of the user's stay as they are, finished work is kept,
and a source that changes meanwhile is noticed."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import subprocess

import pytest
from safetensors.torch import load_file

from cluscomp_peft import ClusCompQuantizationConfig
from cluscomp_peft.cli import main
from cluscomp_peft.compress import checkpoint as checkpoint_module
from cluscomp_peft.compress.checkpoint import compress_checkpoint
from cluscomp_peft.compress.policy import Policy
from cluscomp_peft.compress.stream import folder as target_folder
from cluscomp_peft.compress.stream import journal as journal_module
from cluscomp_peft.compress.stream import shards as shard
from cluscomp_peft.compress.stream.journal import Journal
from tests.conftest import tiny_llama

CONFIG = ClusCompQuantizationConfig(group_size=3, num_clusters=12, quality="fast")


def compressed(source, target, **settings) -> None:
    compress_checkpoint(str(source), str(target), CONFIG, **settings)


def everything(folder) -> dict[str, bytes | str]:
    """Every file below a folder with its content, and every link with its target."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            found[os.path.relpath(path, folder)] = os.readlink(path) if os.path.islink(path) else read(path)
    return found


def read(path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


class Killed(BaseException):
    pass


@pytest.fixture
def killed(monkeypatch):
    """A run that ends by `Killed` leaves its folder as a killed process would."""
    monkeypatch.setattr("cluscomp_peft.compress.stream.folder._keep_or_discard", lambda *args, **kwargs: None)


def raising(monkeypatch, owner, name: str, error: BaseException, call: int = 1) -> None:
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


# -- files of the user's


@pytest.mark.parametrize(
    "content",
    ["[1, 2]", "{}", "{", '{"settings": {}, "content": {"done": {}}}', '{"entries": ["Monday"]}', "my journal"],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_notes_is_left_as_it_is(content, overwrite, dense_dir, tmp_path):
    notes, old = tmp_path / "notes", tmp_path / ".notes.old"
    notes.mkdir()
    old.mkdir()
    (notes / "journal.json").write_text(content)
    (notes / "lock").write_text("the key is under the mat")
    (old / "diary").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=r"exists already|holds something that is no model"):
        compressed(dense_dir, notes, overwrite=overwrite)
    assert everything(tmp_path) == before


def test_the_journal_of_a_run_that_someone_copied_is_no_proof(dense_dir, tmp_path, killed, monkeypatch):
    """Only the folder that the journal was moved with is the one that the run made."""
    with monkeypatch.context() as patch:
        raising(patch, target_folder, "_tidy", Killed())
        with pytest.raises(Killed):
            compressed(dense_dir, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    before = everything(tmp_path / "copy")
    assert {"journal.json", "lock"} <= before.keys()
    with pytest.raises(ValueError, match="exists already"):
        compressed(dense_dir, tmp_path / "copy")
    assert everything(tmp_path / "copy") == before
    with pytest.raises(ValueError, match="exists already"):
        compressed(dense_dir, tmp_path / "out")
    assert not {"journal.json", "lock"} & everything(tmp_path / "out").keys()


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_that_have_the_names_of_ours_stay(overwrite, dense_dir, compressed_dir, tmp_path):
    """`.out.old` is not made by this run, so it is set aside by another name and not removed."""
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "diary").write_text("mine")
    if overwrite:
        shutil.copytree(compressed_dir, tmp_path / "out")
    compressed(dense_dir, tmp_path / "out", overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == [".out.old", "out"]
    assert (tmp_path / ".out.old" / "diary").read_text() == "mine"
    assert not {"journal.json", "lock"} & everything(tmp_path / "out").keys()


@pytest.mark.parametrize("kind", ["files", "journal of another program", "link", "pipe", "lock that is a link"])
def test_a_working_folder_that_is_not_ours_is_refused_and_stays(kind, dense_dir, tmp_path):
    work, elsewhere = tmp_path / ".out.partial", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "diary").write_text("mine")
    if kind == "link":
        work.symlink_to(elsewhere)
    else:
        work.mkdir()
    if kind == "files":
        (work / "diary").write_text("mine")
    elif kind == "journal of another program":
        (work / "journal.json").write_text('{"settings": {"a": 1}, "content": {}}')
        (work / "diary").write_text("mine")
    elif kind == "pipe":
        os.mkfifo(work / "lock")
    elif kind == "lock that is a link":
        (work / "lock").symlink_to(elsewhere / "diary")
    before = {name: value for name, value in everything(elsewhere).items()}
    names = sorted(os.listdir(work))
    for overwrite in (False, True):
        with pytest.raises((ValueError, OSError), match=r"\.out\.partial"):
            compressed(dense_dir, tmp_path / "out", overwrite=overwrite)
    assert everything(elsewhere) == before and sorted(os.listdir(work)) == names
    assert not (tmp_path / "out").exists()


def test_a_link_is_refused_before_any_work(dense_dir, tmp_path):
    (tmp_path / "real").mkdir()
    for place in ("real", "absent"):
        link = tmp_path / f"link to {place}"
        link.symlink_to(tmp_path / place)
        with pytest.raises(ValueError, match=f"is a symbolic link to .*{place}; name that folder itself"):
            compressed(dense_dir, link)
        assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link to absent", "link to real", "real"]


def test_a_mount_point_is_refused_before_any_work(dense_dir, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"is a mount point.*choose a folder inside it"):
        compressed(dense_dir, "/proc")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        with pytest.raises(ValueError, match="is a mount point"):
            compressed(dense_dir, disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert os.listdir(tmp_path) == ["disk"]


def test_a_folder_that_is_filled_during_the_run_is_left_alone(dense_dir, tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    save = shard.save_tensors

    def filling(*args):
        (target / "diary").write_text("mine")
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shard, "save_tensors", filling)
        with pytest.raises(ValueError, match="exists already"):
            compressed(dense_dir, target)
    assert (target / "diary").read_text() == "mine"
    (target / "diary").unlink()
    monkeypatch.setattr(shard, "save_tensors", lambda *args: pytest.fail("it was done already"))
    compressed(dense_dir, target)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("config", ['{"compilerOptions": {}}', "[]", "{", None])
def test_overwrite_knows_a_model_from_what_has_a_config(config, dense_dir, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "diary").write_text("mine")
    if config is not None:
        (target / "config.json").write_text(config)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="no model, which --overwrite does not touch"):
        compressed(dense_dir, target, overwrite=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("again", [{}, {"dtype": "bfloat16"}])
def test_a_checkpoint_that_was_set_aside_comes_back(again, dense_dir, compressed_dir, tmp_path, killed, monkeypatch):
    """The run is killed between the two renamings; whoever comes next finds the old checkpoint in its place."""
    target = tmp_path / "out"
    shutil.copytree(compressed_dir, target)
    before = everything(target)
    rename = os.rename

    def once(*args):
        rename(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(target_folder.os, "rename", once)
        with pytest.raises(Killed):
            compressed(dense_dir, target, overwrite=True)
    assert not target.exists() and sorted(os.listdir(tmp_path)) == [".out.old", ".out.partial"]
    # Without --overwrite only a run with the same settings gets as far as the folder.
    with pytest.raises(ValueError, match="exists already" if not again else "unfinished run with another"):
        compressed(dense_dir, target, **again)
    if not again:
        assert everything(target) == before
    compressed(dense_dir, target, overwrite=True, **again)
    assert os.listdir(tmp_path) == ["out"] and everything(target).keys() != before.keys()


@pytest.mark.parametrize("first", [True, False])
def test_a_temporary_name_that_is_taken_is_left_alone(first, tmp_path):
    """A file that is written beside those of the user's: a page, a file of GGUF."""
    taken = tmp_path / "page.html.tmp"
    taken.write_text("mine")

    def write(path: str) -> None:
        with open(path, "w") as file:
            file.write("whole")
        if not first:
            raise Killed

    if first:
        journal_module.put_file(str(tmp_path / "page.html"), write)
    else:
        with pytest.raises(Killed):
            journal_module.put_file(str(tmp_path / "page.html"), write)
    assert taken.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == (["page.html", taken.name] if first else [taken.name])


# -- work that is done


@pytest.mark.parametrize("what", ["read error", "damaged weight", "interrupt"])
def test_only_a_user_discards_work(what, dense_dir, tmp_path, monkeypatch, capsys):
    """Whatever ends a run, shards that are finished stay, and the command that is given again takes them."""
    source, target = tmp_path / "source", tmp_path / "out"
    shutil.copytree(dense_dir, source)
    done = []
    commit = Journal.commit

    def noting(self, **values):
        commit(self, **values)
        done[:] = self.content.get("done", {})

    monkeypatch.setattr(Journal, "commit", noting)
    with monkeypatch.context() as patch:
        if what == "read error":
            opened = builtins.open

            def failing(path, *args, **kwargs):
                if len(done) == 1 and str(path).endswith("model.safetensors") and str(source) in str(path):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return opened(path, *args, **kwargs)

            patch.setattr(builtins, "open", failing)
        elif what == "damaged weight":
            raising(patch, Policy, "cluster", ValueError("model.layers.1.mlp: NaN"), call=9)
        else:
            raising(patch, Policy, "cluster", KeyboardInterrupt(), call=9)
        status = main(["compress", str(source), str(target), "--bits", "6"])
    error = capsys.readouterr().err
    assert status == (130 if what == "interrupt" else 1) and "Traceback" not in error
    if what == "read error":
        assert "cannot be read (Input/output error); run the same command again" in error
        assert "download" not in error
    if what != "interrupt":
        assert "1 finished shards stay in" in error
    assert len(done) == 1 and done[0] in os.listdir(tmp_path / ".out.partial")
    written = []
    save = shard.save_tensors
    monkeypatch.setattr(shard, "save_tensors", lambda path, *args: (written.append(path), save(path, *args)))
    assert main(["compress", str(source), str(target), "--bits", "6"]) == 0
    assert written and not any(path.endswith(done[0]) for path in written)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_a_run_that_ends_before_anything_is_done_leaves_nothing(dense_dir, tmp_path, monkeypatch):
    raising(monkeypatch, Policy, "cluster", OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError):
        compressed(dense_dir, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("when", ["matrices", "shards", "end"])
def test_a_source_that_is_replaced_meanwhile(when, dense_dir, tmp_path, monkeypatch):
    """Half of one model and half of another has the right names and shapes, and nothing else would notice."""
    source, other = tmp_path / "source", tmp_path / "other"
    shutil.copytree(dense_dir, source)
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data.mul_(-1)
    model.save_pretrained(other)
    owner, name, call = {
        "matrices": (Policy, "cluster", 9),
        "shards": (shard, "save_tensors", 2),
        "end": (checkpoint_module, "compress_shards", 1),
    }[when]
    original, calls = getattr(owner, name), []

    def replacing(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            shutil.copyfile(other / "model.safetensors", source / "model.safetensors")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replacing)
        with pytest.raises(ValueError, match=r"changed while it was read \(model.safetensors\).*--overwrite"):
            compressed(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if (tmp_path / ".out.partial").exists():  # its shards are of the model that is gone
        with pytest.raises(ValueError, match=r"unfinished run with another source.*--overwrite"):
            compressed(source, tmp_path / "out")
    compressed(source, tmp_path / "out", overwrite=True)
    compressed(other, tmp_path / "expected")
    assert read(tmp_path / "out" / "model.safetensors") == read(tmp_path / "expected" / "model.safetensors")


# -- what can fail at the very end


@pytest.mark.parametrize("content", ["{", "[]", "7", '"x"', "\ud800", "[" * 100_000])
def test_a_bad_generation_config_is_said_before_any_work(content, dense_dir, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(dense_dir, source)
    (source / "generation_config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    monkeypatch.setattr(Policy, "cluster", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=r"generation_config\.json is damaged.*mend or remove it"):
        compressed(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["pipe", "broken link", "folder"])
def test_generation_settings_that_are_no_file_are_not_waited_for(what, dense_dir, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dense_dir, source)
    path = source / "generation_config.json"
    path.unlink()
    {"pipe": os.mkfifo, "broken link": lambda path: path.symlink_to("absent"), "folder": os.mkdir}[what](path)
    with pytest.raises(ValueError, match=r"generation_config\.json is damaged \(it is no file\)"):
        compressed(source, tmp_path / "out")


@pytest.mark.parametrize(
    "content", ['{"temperature": 0.5, "top_k": "many"}', '{"do_sample": false, "top_p": 0.3}', None]
)
def test_generation_settings_are_those_of_the_source(content, dense_dir, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(dense_dir, source)
    if content is None:
        (source / "generation_config.json").unlink()
    else:
        (source / "generation_config.json").write_text(content)
    compressed(source, tmp_path / "out")
    found = tmp_path / "out" / "generation_config.json"
    if content is None:
        assert json.loads(found.read_text())["eos_token_id"] == 1  # that of config.json
    else:
        assert found.read_text() == content


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_disk_that_is_full_as_libraries_say_it(call, dense_dir, tmp_path, monkeypatch, capsys):
    """safetensors and tokenizers raise no OSError."""
    target = tmp_path / "out"
    save, calls = journal_module.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "save_file", full)
        assert main(["compress", dense_dir, str(target), "--bits", "6"]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path} is full; make room there" in error and "Traceback" not in error
    assert main(["compress", dense_dir, str(target), "--bits", "6"]) == 0
    assert os.listdir(tmp_path) == ["out"]
    assert load_file(target / "model.safetensors")
