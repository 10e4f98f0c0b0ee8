"""A run folder that lives in Google Drive or on the Hugging Face Hub."""

from pathlib import Path

from tabletune.errors import StageError, first_line, hub_error
from tabletune.run.files import atomic_write


def open_run(run_dir: str | Path) -> Path:
    """The folder of the run.

    Mounts Google Drive for "drive:NAME", fetches what the Hub has for "hub:OWNER/NAME".

    Raises StageError if there is no Drive here, or if the Hub cannot be asked.
    """
    place, _, name = str(run_dir).rpartition(":")
    # rpartition: a Windows path such as C:\runs has a colon, too, and no known place before it
    if place == "drive":
        return open_drive(run_dir, name)
    if place == "hub":
        return fetch_run(run_dir, name)
    return Path(run_dir).expanduser()


def open_drive(run_dir: str | Path, name: str) -> Path:
    """The folder `name` of Google Drive, which is mounted for it.

    Raises StageError outside Colab.
    """
    try:
        from google.colab import drive
    except ImportError:
        raise StageError(
            f"run_dir={run_dir}: only Colab can mount Google Drive. Use a folder here."
        ) from None
    drive.mount(str(Path.cwd() / "drive"))
    return Path.cwd() / "drive" / "MyDrive" / name


def fetch_run(run_dir: str | Path, name: str) -> Path:
    """The folder in `runs/` for a run on the Hub.

    With its data set and its adapter, as far as the Hub has them. Raises StageError if the Hub
    cannot be asked, or if the repository is somebody else's and cannot be read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    run = Path("runs") / name.replace("/", "--")
    for kind, part in (("dataset", "dataset"), ("model", "adapter")):
        # what is here already may be newer than the Hub's
        if (run / part).exists():
            continue
        try:
            with atomic_write(run / part) as folder:
                snapshot_download(name, repo_type=kind, local_dir=folder)
        except RepositoryNotFoundError as error:
            # Not made yet. But to those who may not read it, a private repository looks the same.
            if not is_mine(name.split("/")[0]):
                raise hub_error(f"run_dir={run_dir}", error) from None
        except (OSError, ValueError) as error:
            raise hub_error(f"run_dir={run_dir}", error) from None
    return run


def is_mine(owner: str) -> bool:
    """Whether an owner on the Hub is the reader, or an organization of theirs.

    No without a valid token.
    """
    from huggingface_hub import HfApi

    try:
        account = HfApi().whoami()
    except (OSError, ValueError):
        return False
    organizations = [organization["name"] for organization in account.get("orgs", [])]
    return owner in [account["name"], *organizations]


def upload_result(run_dir: str | Path, folder: Path) -> None:
    """Upload a finished folder of the run to its private repository, if the run lives on the Hub.

    Raises StageError if the Hub refuses.
    """
    from huggingface_hub import create_repo, upload_folder

    place, _, name = str(run_dir).rpartition(":")
    if place != "hub":
        return
    # the Hub keeps data sets and models apart, so a run is two repositories of one name
    kind = "dataset" if folder.name == "dataset" else "model"
    try:
        create_repo(name, repo_type=kind, private=True, exist_ok=True)
        upload_folder(repo_id=name, repo_type=kind, folder_path=folder)
    except (OSError, ValueError) as error:
        raise StageError(
            f"{folder} is complete, but it could not go to the Hub as {name}: {first_line(error)}"
        ) from None
