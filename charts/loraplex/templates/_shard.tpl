{{/* The shards' pods and their addresses. */}}

{{- define "loraplex.tp" -}}
{{ int (default 1 .Values.shard.settings.tp) }}
{{- end }}

{{- define "loraplex.ranksInPod" -}}
{{ div (include "loraplex.tp" .) .Values.shard.nodes }}
{{- end }}

{{/* A router's --shards. It is the same text for all routers, because each inserts its own number. A LeaderWorkerSet's
     replicas have no common name, so their pods are named, including those that an update adds for a while. */}}
{{- define "loraplex.shardAddresses" -}}
{{- $name := include "loraplex.shardName" (list . "$(ROUTER)") }}
{{- $domain := printf "%s.%s.svc" $name .Release.Namespace }}
{{- if ne .Values.shard.workload "LeaderWorkerSet" -}}
dns:///{{ $domain }}:50060
{{- else }}
{{- $surge := dig "rolloutStrategy" "rollingUpdateConfiguration" "maxSurge" 0 .Values.shard.workloadSpec }}
{{- $replicas := list }}
{{- range $replica := until (add .Values.shard.replicas $surge | int) }}
{{- $ranks := list }}
{{- range $node := until (int $.Values.shard.nodes) }}
{{- $pod := eq $node 0 | ternary (printf "%s-%d" $name $replica) (printf "%s-%d-%d" $name $replica $node) }}
{{- range $rank := until (include "loraplex.ranksInPod" $ | int) }}
{{- $ranks = append $ranks (printf "%s.%s:%d" $pod $domain (add 50060 $rank)) }}
{{- end }}
{{- end }}
{{- $replicas = append $replicas (join "," $ranks) }}
{{- end }}
{{- join ";" $replicas }}
{{- end }}
{{- end }}

{{/* The GPU resource that the ranks of a pod request; empty if there is none */}}
{{- define "loraplex.gpu" -}}
{{- range $name, $count := merge (dict) (.Values.shard.resources.limits | default dict) (.Values.shard.resources.requests | default dict) }}
{{- if and (regexMatch "^(nvidia|amd)[.]com/(gpu([.].+)?|mig-.+)$" $name) (ne (toString $count) "0") }}{{ $name }}{{ end }}
{{- end }}
{{- end }}

{{/* Flags from `shard.settings`. Ranks that request GPUs must not fall back to the CPU if they find none. */}}
{{- define "loraplex.shardFlags" -}}
{{- $settings := deepCopy .Values.shard.settings }}
{{- if and (include "loraplex.gpu" .) (eq (get $settings "device" | default "auto") "auto") }}
{{- $_ := set $settings "device" "cuda" }}
{{- end }}
{{- include "loraplex.flags" $settings }}
{{- end }}

{{/* The container of a pod's ranks. All of them are in one, because GPUs can only exchange data directly, over NVLink or
     PCIe, where a container has both. */}}
{{- define "loraplex.shard" -}}
{{- $shard := .Values.shard }}
{{- $ranks := until (include "loraplex.ranksInPod" . | int) -}}
name: shard
args:
  - shard
  - {{ printf "--listen=%s" (include "loraplex.listen" (list $ 50060)) | quote }}
  - --metrics-port={{ .Values.metrics.shardPort }}
  {{- if gt (int $shard.nodes) 1 }}
  - --nodes={{ $shard.nodes }}
  - --node-rank=$(NODE_RANK)
  - --rendezvous=tcp://$(LWS_LEADER_ADDRESS):29500
  {{- end }}
  {{- if include "loraplex.hasAdapters" . }}
  - --adapters=/adapters
  {{- end }}
  {{- range $name, $store := pick $shard.adapters "azure" "gcs" "s3" }}
  {{- with $store.url }}
  - {{ printf "--adapters-%s=%s" $name . | quote }}
  {{- end }}
  {{- end }}
  {{- include "loraplex.mtlsFlags" (list . "shardSecret") | trim | nindent 2 }}
  {{- include "loraplex.shardFlags" . | trim | nindent 2 }}
env:
  {{- if gt (int $shard.nodes) 1 }}
  - name: NODE_RANK
    valueFrom: {fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']"}}
  {{- end }}
  {{- include "loraplex.shardEnv" . | nindent 2 }}
ports:
  {{- range $rank := $ranks }}
  - {name: grpc-{{ $rank }}, containerPort: {{ add 50060 $rank }}}
  {{- end }}
  {{- range $rank := $ranks }}
  - {name: metrics-{{ $rank }}, containerPort: {{ add $.Values.metrics.shardPort $rank }}}
  {{- end }}
# The port opens once the model is loaded. The first rank is asked for all: when one ends or hangs, the others end too.
startupProbe:
  {{- include "loraplex.shardProbe" (list . "") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: {{ div (add $shard.startupSeconds 4) 5 }}
readinessProbe:
  {{- include "loraplex.shardProbe" (list . ", service: loraplex.shard.v1.ShardService") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
# A separate thread answers however long steps take, so silence means that the process hangs. With mutual TLS the
# kubelet cannot call the health service, and an open port proves nothing, so it fetches metrics.
livenessProbe:
  {{- if .Values.mtls.shardSecret }}
  httpGet: {path: /metrics, port: {{ .Values.metrics.shardPort }}}
  {{- else }}
  {{- include "loraplex.shardProbe" (list . "") | nindent 2 }}
  {{- end }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
volumeMounts:
  {{- include "loraplex.shardVolumeMounts" . | nindent 2 }}
{{- end }}

{{/* (list $ more): the kubelet cannot call the health service over mutual TLS */}}
{{- define "loraplex.shardProbe" -}}
{{- if (index . 0).Values.mtls.shardSecret -}}
tcpSocket: {port: 50060}
{{- else -}}
grpc: {port: 50060{{ index . 1 }}}
{{- end }}
{{- end }}

{{- define "loraplex.hasAdapters" -}}
{{- if or .Values.shard.adapters.existingClaim .Values.shard.adapters.configMaps }}yes{{ end }}
{{- end }}

{{- define "loraplex.shardEnv" -}}
- {name: HOME, value: /tmp}
- {name: HF_HOME, value: /cache}
{{- if include "loraplex.gpu" . }}
# What Triton compiles is kept beside the model.
- {name: TRITON_CACHE_DIR, value: /cache/triton}
{{- end }}
{{- with .Values.shard.hub.endpoint }}
- {name: HF_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- with .Values.shard.hub.existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $.Values.shard.hub.key | quote }}}}
{{- end }}
{{- include "loraplex.storesEnv" .Values.shard.adapters }}
{{- $cpus := dig "limits" "cpu" "" .Values.shard.resources }}
{{- if and $cpus (not (hasKey .Values.shard.settings "threads")) }}
# torch would count the node's cores.
- {name: LORAPLEX_THREADS, value: {{ divf (include "loraplex.number" $cpus) (include "loraplex.ranksInPod" .) | floor | max 1 | quote }}}
{{- end }}
{{- with .Values.shard.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "loraplex.shardVolumeMounts" -}}
{{- $shard := .Values.shard -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: cache, mountPath: /cache}
{{- if $shard.modelImage.reference }}
- {name: model, mountPath: /model, readOnly: true}
{{- end }}
{{- with $shard.adapters.existingClaim }}
- {name: adapters, mountPath: /adapters, readOnly: true{{ with $shard.adapters.subPath }}, subPath: {{ . | quote }}{{ end }}}
{{- end }}
{{- range $index, $adapter := $shard.adapters.configMaps }}
- {name: adapter-{{ $index }}, mountPath: {{ printf "/adapters/%s" $adapter.id | quote }}, readOnly: true}
{{- end }}
{{- include "loraplex.mtlsMount" (list . "shardSecret") }}
{{- with $shard.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "loraplex.shardVolumes" -}}
{{- $shard := .Values.shard -}}
- {name: tmp, emptyDir: {}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $shard.sharedMemory }}}}
{{- if $shard.modelCache.existingClaim }}
- {name: cache, persistentVolumeClaim: {claimName: {{ $shard.modelCache.existingClaim | quote }}}}
{{- else if not $shard.modelCache.persistent }}
- {name: cache, emptyDir: {sizeLimit: {{ $shard.modelCache.size }}}}
{{- end }}
{{- with $shard.modelImage.reference }}
- {name: model, image: {reference: {{ . | quote }}, pullPolicy: {{ $shard.modelImage.pullPolicy }}}}
{{- end }}
{{- with $shard.adapters.existingClaim }}
- {name: adapters, persistentVolumeClaim: {claimName: {{ . | quote }}, readOnly: true}}
{{- end }}
{{- range $index, $adapter := $shard.adapters.configMaps }}
- {name: adapter-{{ $index }}, configMap: {name: {{ $adapter.name | quote }}}}
{{- end }}
{{- include "loraplex.mtlsVolume" (list . "shardSecret") }}
{{- with $shard.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* (list $ N): the template of the pods of router N's replicas */}}
{{- define "loraplex.shardTemplate" -}}
{{- $root := index . 0 -}}
metadata:
  {{- include "loraplex.podMetadata" (list $root "shard" (include "loraplex.shardSelector" .)) | trim | nindent 2 }}
spec:
  {{- include "loraplex.podSpec" (list $root "shard" (include "loraplex.shardPod" $root | fromYaml)) | nindent 2 }}
{{- end }}

{{- define "loraplex.shardPod" -}}
terminationGracePeriodSeconds: {{ add (ceil (index .Values.shard.settings "drain-seconds" | default 30)) 10 }}
{{- with .Values.shard.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
containers:
  - {{- include "loraplex.container" (list . "shard" (include "loraplex.shard" . | fromYaml)) | nindent 4 }}
volumes:
  {{- include "loraplex.shardVolumes" . | nindent 2 }}
{{- end }}

{{/* A claim for each pod, if the model cache is persistent */}}
{{- define "loraplex.claims" -}}
{{- $cache := .Values.shard.modelCache }}
{{- if and $cache.persistent (not $cache.existingClaim) -}}
# Their content can be downloaded again.
persistentVolumeClaimRetentionPolicy: {whenDeleted: Delete, whenScaled: Delete}
volumeClaimTemplates:
  - metadata:
      name: cache
      labels:
        {{- include "loraplex.selector" (list . "shard") | nindent 8 }}
    spec:
      accessModes: [ReadWriteOnce]
      {{- with $cache.storageClassName }}
      storageClassName: {{ . | quote }}
      {{- end }}
      resources: {requests: {storage: {{ $cache.size }}}}
{{- end }}
{{- end }}

{{/* (list $ N): the spec of each kind of workload. The router finds a replica and warms it up within a minute after its
     pod is ready; until then, the next pod is not replaced. */}}
{{- define "loraplex.shardStatefulSet" -}}
{{- $root := index . 0 -}}
serviceName: {{ include "loraplex.shardName" . }}
podManagementPolicy: Parallel
updateStrategy: {type: RollingUpdate}
minReadySeconds: 60
{{ include "loraplex.shardReplicas" $root }}
selector:
  matchLabels:
    {{- include "loraplex.shardSelector" . | nindent 4 }}
template:
  {{- include "loraplex.shardTemplate" . | nindent 2 }}
{{ include "loraplex.claims" $root }}
{{- end }}

{{- define "loraplex.shardDeployment" -}}
# Start a new replica before an old one stops.
strategy: {type: RollingUpdate, rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}
minReadySeconds: 60
progressDeadlineSeconds: {{ add (index . 0).Values.shard.startupSeconds 600 }}
{{ include "loraplex.shardReplicas" (index . 0) }}
selector:
  matchLabels:
    {{- include "loraplex.shardSelector" . | nindent 4 }}
template:
  {{- include "loraplex.shardTemplate" . | nindent 2 }}
{{- end }}

{{- define "loraplex.shardLeaderWorkerSet" -}}
{{- $root := index . 0 -}}
{{ include "loraplex.shardReplicas" $root }}
rolloutStrategy: {type: RollingUpdate, rollingUpdateConfiguration: {maxUnavailable: 1, maxSurge: 0}}
networkConfig: {subdomainPolicy: Shared}
leaderWorkerTemplate:
  size: {{ $root.Values.shard.nodes }}
  # Ranks can only start together.
  restartPolicy: RecreateGroupOnPodRestart
  workerTemplate:
    {{- include "loraplex.shardTemplate" . | nindent 4 }}
  {{- include "loraplex.claims" $root | nindent 2 }}
{{- end }}

{{/* With an autoscaler, the chart must not set the number. */}}
{{- define "loraplex.shardReplicas" -}}
{{- if not (or .Values.autoscaling.enabled .Values.keda.enabled) }}replicas: {{ .Values.shard.replicas }}{{ end }}
{{- end }}

{{/* KIND: its API version */}}
{{- define "loraplex.workloadApi" -}}
{{ eq . "LeaderWorkerSet" | ternary "leaderworkerset.x-k8s.io/v1" "apps/v1" }}
{{- end }}
