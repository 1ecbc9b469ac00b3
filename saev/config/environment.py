"""Environment variables that steps get from the cluster's Secret and ConfigMap.

On a cluster both are mounted as folders with one file per key. The supervisor of a step
(`saev.steps.environment`) turns the files into environment variables. They are not variables of the
pod, because Kubernetes stores these six times for each pod, which would be most of a run's record.
"""

SECRET_ENV = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
CONFIG_ENV = (
    "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE",
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "SAEV_LOG_LEVEL",
    "SAEV_CACHE_DIR", "SAEV_CACHE_GB", "SAEV_DIRECT_IO", "SAEV_PATIENCE_S",
)  # fmt: skip
"""Keys of the Secret and of the ConfigMap that become environment variables of steps. All are
optional: on AWS, credentials come from the role of the service account."""

SECRET_MOUNT = "/saev/secret"
CONFIG_MOUNT = "/saev/config"
"""Folders at which they are mounted."""
