"""How a command names several SAEs."""

import pydantic

from saev import storage
from saev.config.base import Config, refuse
from saev.config.train import RUN, TrainConfig
from saev.errors import ConfigError


class ManySaes(Config):
    """The SAEs of a command."""

    run: tuple[str, ...] = ()
    """URLs of run folders."""
    runs: str = ""
    """URL of a folder of run folders, such as out/runs: take all of them that are complete."""
    tag: str = ""
    """Of the run folders in --runs, take only those that were trained with this --tag."""

    @pydantic.model_validator(mode="after")
    def _names_saes(self) -> "ManySaes":
        if self.tag and not self.runs:
            refuse("--tag chooses among the run folders of --runs URL, which is missing")
        if not self.run and not self.runs:
            refuse("Name an SAE: --run URL (or several), or --runs URL for all runs")
        return self

    def named(self, *single: str) -> dict[str, str]:
        """The SAEs as they were given, by their URLs, without repetitions. Looks into ``runs``.

        Args:
            single: names of flags that are only for one SAE.

        Raises:
            ConfigError: there are none in ``runs``, or a setting does not fit several SAEs.
        """
        found: dict[str, str] = {}
        for given in self.run:
            url = given if given.startswith("hf-hub:") else storage.normalize(given)
            found.setdefault(url, given)
        for url in self._found() if self.runs else ():
            found.setdefault(url, url)
        for name in single:
            if getattr(self, name) and len(found) > 1:
                raise ConfigError(
                    f"--{name} is one folder, but there are {len(found)} SAEs. Leave it out: the "
                    "results of each go into its run folder."
                )
        return found

    def _found(self) -> list[str]:
        """Complete run folders in ``runs``, by name."""
        place = storage.normalize(self.runs)
        folders = [entry.url for entry in storage.list_dir(place) if entry.is_dir]
        complete = [url for url in folders if storage.exists(storage.join(url, RUN))]
        if not complete:
            raise ConfigError(
                f"{place} has no complete run folders. Expected a folder of them, such as out/runs."
            )
        if not self.tag:
            return sorted(complete)
        tags = {url: TrainConfig.of_run(url).tag for url in complete}
        found = sorted(url for url, tag in tags.items() if tag == self.tag)
        if not found:
            known = ", ".join(repr(tag) for tag in sorted(set(tags.values()) - {""})) or "none"
            raise ConfigError(
                f"No complete run in {place} has the tag {self.tag!r}; tags there: {known}."
            )
        return found
