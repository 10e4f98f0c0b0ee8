"""A run folder that lives in Google Drive or on the Hugging Face Hub."""

from pathlib import Path

from tabletune.errors import StageError, hub_error
from tabletune.run.files import whole


def open_run(run_dir):
    """The folder of the run. Mounts Google Drive for "drive:NAME", fetches what the Hub has for "hub:OWNER/NAME".

    Raises StageError if there is no Drive here, or if the Hub cannot be asked.
    """
    place, _, name = str(run_dir).rpartition(":")
    if place == "drive":
        try:
            from google.colab import drive
        except ImportError:
            raise StageError(
                f"run_dir={run_dir}: only Colab can mount Google Drive. Use a folder here."
            ) from None
        drive.mount(str(Path.cwd() / "drive"))
        return Path.cwd() / "drive" / "MyDrive" / name
    if place != "hub":
        return Path(run_dir).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    run = Path("runs") / name.replace("/", "--")
    for kind, part in (("dataset", "dataset"), ("model", "adapter")):
        if not (run / part).exists():
            try:
                with whole(run / part) as folder:
                    snapshot_download(name, repo_type=kind, local_dir=folder)
            except (
                RepositoryNotFoundError
            ) as error:  # not made yet; but to those who are not its owner, private is 404
                if not is_mine(name.split("/")[0]):
                    raise hub_error(f"run_dir={run_dir}", error) from None
            except (OSError, ValueError) as error:
                raise hub_error(f"run_dir={run_dir}", error) from None
    return run


def is_mine(owner):
    """Whether an owner on the Hub is the reader or an organization of theirs; no without a token that the Hub takes."""
    from huggingface_hub import HfApi

    try:
        who = HfApi().whoami()
    except (OSError, ValueError):
        return False
    return owner in [who["name"], *(org["name"] for org in who.get("orgs", []))]


def hand_over(run_dir, folder):
    """Upload a finished folder of the run to its private repository, if the run lives on the Hub.

    Raises StageError if the Hub refuses.
    """
    from huggingface_hub import create_repo, upload_folder

    place, _, name = str(run_dir).rpartition(":")
    kind = "dataset" if folder.name == "dataset" else "model"
    try:
        if place == "hub":
            create_repo(name, repo_type=kind, private=True, exist_ok=True)
            upload_folder(repo_id=name, repo_type=kind, folder_path=folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(
            f"{folder} is here, but could not go to the Hub as {name}: {reason}"
        ) from None
