"""Kubernetes' strict schemas, of which kubernetes_validate would read megabytes at every call."""

import functools

import kubernetes_validate
from kubernetes_validate import utils

utils.schema_contents = functools.cache(utils.schema_contents)
utils.all_versions = functools.cache(utils.all_versions)

latest_version = kubernetes_validate.latest_version
SchemaNotFoundError = kubernetes_validate.SchemaNotFoundError
ValidationError = kubernetes_validate.ValidationError
validate = functools.partial(kubernetes_validate.validate, strict=True)
