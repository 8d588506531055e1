{{- define "quickchange.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}
{{- end }}

{{- define "quickchange.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Of the pods that are no servers: no traffic comes to them. */}}
{{- define "quickchange.testSelector" -}}
app.kubernetes.io/name: {{ include "quickchange.fullname" . }}-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "quickchange.trainSelector" -}}
app.kubernetes.io/name: {{ include "quickchange.fullname" . }}-train
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "quickchange.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "quickchange.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "quickchange.image" -}}
{{- $tag := default (printf "%s%s" .Chart.AppVersion (ternary "-cuda" "" (gt (int .Values.gpu.count) 0))) .Values.image.tag -}}
{{ .Values.image.repository }}:{{ $tag }}
{{- end }}

{{- define "quickchange.isScaled" -}}
{{- if or (gt (int .Values.replicas) 1) .Values.autoscaling.hpa.enabled .Values.autoscaling.keda.enabled }}true{{ end }}
{{- end }}

{{- define "quickchange.isScaledByOthers" -}}
{{- if or .Values.autoscaling.hpa.enabled .Values.autoscaling.keda.enabled }}true{{ end }}
{{- end }}

{{- define "quickchange.claim" -}}
{{- default (printf "%s-store" (include "quickchange.fullname" .)) .Values.store.volume.existingClaim }}
{{- end }}

{{/* What must not be deployed, with the reason and what to do. */}}
{{- define "quickchange.check" -}}
{{- $v := .Values }}
{{- if and $v.autoscaling.hpa.enabled $v.autoscaling.keda.enabled }}
{{- fail "autoscaling.hpa and autoscaling.keda would both set the number of servers: enable one of them" }}
{{- end }}
{{- if and (include "quickchange.isScaled" .) (not $v.catalog.existingSecret) }}
{{- fail "more than one server needs a shared catalog: SQLite serves one. Set catalog.existingSecret to a secret with the URL of a PostgreSQL database" }}
{{- end }}
{{- if and (include "quickchange.isScaled" .) (eq $v.store.type "volume") (eq $v.store.volume.accessMode "ReadWriteOnce") }}
{{- fail "more than one server needs a store that all can write: set store.type to s3, or store.volume.accessMode to ReadWriteMany" }}
{{- end }}
{{- if and (eq $v.store.type "s3") (not (hasPrefix "s3://" $v.store.s3.url)) }}
{{- fail "store.type is s3: set store.s3.url to s3://BUCKET/PREFIX" }}
{{- end }}
{{- if and (eq $v.store.type "s3") (not $v.catalog.existingSecret) }}
{{- fail "store.type is s3, and SQLite would be lost with the pod: set catalog.existingSecret to a secret with the URL of a PostgreSQL database" }}
{{- end }}
{{- if and (not $v.auth.existingSecret) (not $v.auth.insecure) }}
{{- fail "set auth.existingSecret to a secret with an admin key (openssl rand -hex 32), or auth.insecure to true to serve everybody who reaches the port" }}
{{- end }}
{{- if and $v.auth.existingSecret $v.auth.insecure }}
{{- fail "auth.existingSecret and auth.insecure contradict each other: choose one" }}
{{- end }}
{{- if and $v.podDisruptionBudget.enabled (not (include "quickchange.isScaled" .)) }}
{{- fail "podDisruptionBudget with a single server would block every drain of its node: raise replicas, or disable it" }}
{{- end }}
{{- if and $v.metrics.serviceMonitor.enabled $v.metrics.podMonitor.enabled }}
{{- fail "metrics.serviceMonitor and metrics.podMonitor would scrape every server twice: enable one of them" }}
{{- end }}
{{- if gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas) }}
{{- fail "autoscaling.minReplicas is more than autoscaling.maxReplicas" }}
{{- end }}
{{- if and $v.gateway.httpRoute.enabled (not $v.gateway.enabled) }}
{{- fail "gateway.httpRoute sends to the pool: set gateway.enabled too" }}
{{- end }}
{{- if and $v.gateway.httpRoute.enabled (not $v.gateway.httpRoute.parentRefs) }}
{{- fail "gateway.httpRoute.enabled: name the gateway in gateway.httpRoute.parentRefs" }}
{{- end }}
{{- if and $v.train.enabled (or (not $v.train.configMap) (not $v.train.name)) }}
{{- fail "train.enabled: set train.configMap (recipe.toml and its data) and train.name" }}
{{- end }}
{{- range $name := list "model" "host" "port" "admin_port" "store" "catalog" "admin_key_file" "insecure" "cache" "drain_delay" "drain_timeout" "served_model_name" "device" }}
{{- if hasKey $v.config $name }}
{{- fail (printf "config.%s: the chart sets this itself; use its own value" $name) }}
{{- end }}
{{- end }}
{{- end }}

{{/* A value as TOML. Helm's own toToml writes 64 as 64.0, which is no count. */}}
{{- define "quickchange.toml" -}}
{{- if kindIs "float64" . }}{{ if eq . (floor .) }}{{ int64 . }}{{ else }}{{ . }}{{ end }}
{{- else if kindIs "map" . }}{ {{- $first := true }}{{ range $key, $value := . }}{{ if not $first }}, {{ end }}{{ $key | quote }} = {{ include "quickchange.toml" $value }}{{ $first = false }}{{ end -}} }
{{- else }}{{ toJson . }}{{ end }}
{{- end }}

{{- define "quickchange.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "quickchange.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}
