"""`embedq pull`: a model of the Hugging Face Hub becomes a directory below the model root, whole or not at all."""

from embedq_sdk.hub.manifest import MANIFEST, Manifest, ManifestFile
from embedq_sdk.hub.pulling import Pulled, PullFailed, pull

__all__ = ["MANIFEST", "Manifest", "ManifestFile", "PullFailed", "Pulled", "pull"]
