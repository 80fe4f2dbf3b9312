#!/bin/sh
# Creates the secrets that the manifests name. Run it once, with those of the variables set that are needed:
#   API_KEYS_FILE (one key a line, 16 characters or more; who may ask the endpoint) and BATCH_KEY (one of them);
#   HF_TOKEN for a gated base; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and perhaps AWS_ENDPOINT_URL for S3;
#   MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for an MLflow server of your own that asks for them.
set -eu
kubectl --namespace hydra-heads create secret generic hydra-heads-keys --from-file=keys="$API_KEYS_FILE" --from-literal=batch="$BATCH_KEY"
kubectl --namespace hydra-heads create secret generic hydra-heads-ray-token --from-literal=auth_token="$(openssl rand -hex 24)"
kubectl --namespace hydra-heads create secret generic hydra-heads-redis --from-literal=password="$(openssl rand -hex 24)"
kubectl --namespace hydra-heads create secret generic hydra-heads-postgres --from-literal=password="$(openssl rand -hex 24)"
[ -z "${HF_TOKEN:-}" ] || kubectl --namespace hydra-heads create secret generic hf-token --from-literal=token="$HF_TOKEN"
[ -z "${AWS_ACCESS_KEY_ID:-}" ] || kubectl --namespace hydra-heads create secret generic hydra-heads-s3 --from-literal=AWS_ACCESS_KEY_ID="$AWS_ACCESS_KEY_ID" --from-literal=AWS_SECRET_ACCESS_KEY="$AWS_SECRET_ACCESS_KEY" ${AWS_ENDPOINT_URL:+--from-literal=AWS_ENDPOINT_URL="$AWS_ENDPOINT_URL"}
[ -z "${MLFLOW_TRACKING_USERNAME:-}" ] || kubectl --namespace hydra-heads create secret generic hydra-heads-mlflow --from-literal=MLFLOW_TRACKING_USERNAME="$MLFLOW_TRACKING_USERNAME" --from-literal=MLFLOW_TRACKING_PASSWORD="$MLFLOW_TRACKING_PASSWORD"
