{{/* The routers' pods. */}}

{{- define "loraplex.routerStatefulSet" -}}
serviceName: {{ include "loraplex.routerName" . }}
replicas: {{ .Values.router.replicas }}
podManagementPolicy: Parallel
# A replica serves one router at a time, so a router's successor starts after it has drained. Routers are replaced one
# at a time, each after the previous one is ready and reached.
updateStrategy: {type: RollingUpdate}
minReadySeconds: 10
selector:
  matchLabels:
    {{- include "loraplex.selector" (list . "router") | nindent 4 }}
template:
  metadata:
    {{- include "loraplex.podMetadata" (list . "router" (include "loraplex.selector" (list . "router"))) | trim | nindent 4 }}
  spec:
    {{- include "loraplex.podSpec" (list . "router" (include "loraplex.routerPod" . | fromYaml)) | nindent 4 }}
{{- end }}

{{- define "loraplex.routerPod" -}}
terminationGracePeriodSeconds: {{ add .Values.router.preStopSeconds (ceil (index .Values.router.settings "drain-seconds" | default 30)) 10 }}
{{- if .Values.router.adapterRegistry.existingClaim }}
initContainers:
  - {{- merge (include "loraplex.newRegistry" . | fromYaml) (include "loraplex.commonContainer" (list . "router") | fromYaml) | toYaml | nindent 4 }}
{{- end }}
containers:
  - {{- include "loraplex.container" (list . "router" (include "loraplex.router" . | fromYaml)) | nindent 4 }}
volumes:
  - {name: tmp, emptyDir: {}}
  {{- with .Values.router.apiKeys.existingSecret }}
  - {name: api-keys, secret: {secretName: {{ . | quote }}}}
  {{- end }}
  {{- with .Values.router.adapterRegistry.existingConfigMap }}
  - {name: adapter-registry, configMap: {name: {{ . | quote }}}}
  {{- end }}
  {{- with .Values.router.adapterRegistry.existingClaim }}
  - {name: adapter-registry, persistentVolumeClaim: {claimName: {{ . | quote }}}}
  {{- end }}
  {{- include "loraplex.mtlsVolume" (list . "routerSecret") | trim | nindent 2 }}
  {{- with .Values.router.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "loraplex.hasRegistry" -}}
{{- with .Values.router.adapterRegistry }}{{ or .existingConfigMap .existingClaim }}{{ end }}
{{- end }}

{{/* Makes the file if the claim is new. With `set -C`, of routers that start together one makes it. */}}
{{- define "loraplex.newRegistry" -}}
name: adapter-registry
command: [sh, -c, 'test -s "$0" || { set -C; echo "adapters: {}" > "$0"; }', {{ printf "/registry/%s" .Values.router.adapterRegistry.key | quote }}]
volumeMounts:
  - {name: adapter-registry, mountPath: /registry}
{{- end }}

{{- define "loraplex.router" -}}
{{- $settings := .Values.router.settings -}}
name: router
args:
  - router
  - {{ printf "--host=%s" .Values.listen | quote }}
  - --http-port=3000
  - --grpc-port=50051
  - --shards={{ include "loraplex.shardAddresses" . }}
  {{- if .Values.router.apiKeys.existingSecret }}
  - {{ printf "--api-keys=/etc/loraplex/api-keys/%s" .Values.router.apiKeys.key | quote }}
  {{- end }}
  {{- if include "loraplex.hasRegistry" . }}
  - {{ printf "--adapter-registry=/etc/loraplex/adapter-registry/%s" .Values.router.adapterRegistry.key | quote }}
  {{- end }}
  {{- range $store := pick .Values.router.batches "azure" "gcs" "s3" }}
  {{- with $store.url }}
  - {{ printf "--batches=%s" . | quote }}
  {{- end }}
  {{- end }}
  {{- if and .Values.gateway.inferencePool.enabled (not (hasKey $settings "gateway-metrics")) }}
  - --gateway-metrics
  {{- end }}
  {{- if and .Values.gateway.inferencePool.enabled (not (hasKey $settings "metrics-auth")) }}
  - --metrics-auth=none
  {{- end }}
  {{- include "loraplex.mtlsFlags" (list . "routerSecret") | trim | nindent 2 }}
  {{- include "loraplex.flags" $settings | trim | nindent 2 }}
env:
  - name: ROUTER
    valueFrom: {fieldRef: {fieldPath: "metadata.labels['apps.kubernetes.io/pod-index']"}}
  {{- include "loraplex.storesEnv" .Values.router.batches | trim | nindent 2 }}
  {{- with .Values.router.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - {name: http, containerPort: 3000}
  - {name: grpc, containerPort: 50051}
startupProbe:
  tcpSocket: {port: http}
  periodSeconds: 2
  failureThreshold: 60
# The router's health service reports ready if a replica is ready.
readinessProbe:
  grpc: {port: 50051, service: loraplex.v1.GenerationService}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
# A router without a replica is alive, so this does not check readiness.
livenessProbe:
  httpGet: {path: /version, port: http}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
lifecycle:
  preStop:
    exec: {command: [sleep, {{ .Values.router.preStopSeconds | quote }}]}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  {{- if .Values.router.apiKeys.existingSecret }}
  - {name: api-keys, mountPath: /etc/loraplex/api-keys, readOnly: true}
  {{- end }}
  {{- if include "loraplex.hasRegistry" . }}
  - {name: adapter-registry, mountPath: /etc/loraplex/adapter-registry, readOnly: {{ empty .Values.router.adapterRegistry.existingClaim }}}
  {{- end }}
  {{- include "loraplex.mtlsMount" (list . "routerSecret") | trim | nindent 2 }}
  {{- with .Values.router.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* The labels by which endpoint pickers find model servers. The model's name is shortened to fit a label. */}}
{{- define "loraplex.poolLabels" -}}
{{- $model := .Values.shard.settings.model | default "SmolLM2-135M-Instruct" | base -}}
llm-d.ai/inference-serving: "true"
llm-d.ai/engine-type: vllm
llm-d.ai/model: {{ regexReplaceAll "[^A-Za-z0-9._-]" $model "-" | trunc 63 | trimAll "-._" | quote }}
{{- end }}
