#!/usr/bin/env bash
# Stream text from Drift with buf curl (pip install buf-bin); jq joins the text. The server describes itself by
# reflection, so no .proto file is needed.
#
#   drift_curl.sh 127.0.0.1:50051 "A list is" [TOKENS]
set -euo pipefail
request=$(jq -n --arg text "$2" --argjson tokens "${3:-40}" \
  '{text: $text, sampling: {temperature: 0}, stopping: {maxTokens: $tokens}}')
buf curl --protocol grpc --http2-prior-knowledge --data "$request" \
  "http://$1/drift.v1.GenerationService/Generate" | jq -rj '.tokenDelta.text // empty'
echo
