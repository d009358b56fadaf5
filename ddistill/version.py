"""The version of the installed package."""


def version() -> str:
    """The version, or "unknown" where the package runs from a folder without being installed."""
    from importlib import metadata

    try:
        return metadata.version("ddistill")
    except metadata.PackageNotFoundError:
        return "unknown"
