{{/* The shards' pods, and where a router finds them. */}}

{{- define "loraplex.tp" -}}
{{ int (default 1 .Values.shard.settings.tp) }}
{{- end }}

{{/* (list $ N): the router's --shards. A LeaderWorkerSet's groups have no name in common, but their pods have names. */}}
{{- define "loraplex.shardAddresses" -}}
{{- $root := index . 0 }}
{{- $name := include "loraplex.shardName" . }}
{{- $domain := printf "%s.%s.svc:50060" $name $root.Release.Namespace }}
{{- if eq $root.Values.shard.workload "StatefulSet" -}}
dns:///{{ $domain }}
{{- else }}
{{- $groups := list }}
{{- range $group := until (int $root.Values.shard.replicas) }}
{{- $ranks := list (printf "%s-%d.%s" $name $group $domain) }}
{{- range $rank := untilStep 1 (include "loraplex.tp" $root | int) 1 }}
{{- $ranks = append $ranks (printf "%s-%d-%d.%s" $name $group $rank $domain) }}
{{- end }}
{{- $groups = append $groups (join "," $ranks) }}
{{- end }}
{{- join ";" $groups }}
{{- end }}
{{- end }}

{{/* (list $ "R"): the container of a rank, of several in a pod; (list $ ""): of the only one in its pod */}}
{{- define "loraplex.rank" -}}
{{- $root := index . 0 }}
{{- $shard := $root.Values.shard }}
{{- $tp := include "loraplex.tp" $root | int }}
{{- $alone := eq (index . 1) "" }}
{{- $rank := index . 1 | int }}
{{- $port := add 50060 $rank -}}
name: rank{{ if not $alone }}-{{ $rank }}{{ end }}
{{ include "loraplex.container" (list $root "shard") }}
args:
  - shard
  - --rank={{ $alone | ternary "$(RANK)" (toString $rank) }}
  - --listen=0.0.0.0:{{ $port }}
  - --metrics-port={{ add $root.Values.metrics.shardPort $rank }}
  {{- if gt $tp 1 }}
  - --rendezvous=tcp://{{ $alone | ternary "$(LWS_LEADER_ADDRESS)" "127.0.0.1" }}:29500
  {{- end }}
  {{- if include "loraplex.hasAdapters" $root }}
  - --adapters=/adapters
  {{- end }}
  {{- with $shard.adapters.s3.url }}
  - --adapters-s3={{ . }}
  {{- end }}
  {{- include "loraplex.mtlsFlags" (list $root "shardSecret") | trim | nindent 2 }}
  {{- include "loraplex.flags" (list $root "shard") | trim | nindent 2 }}
env:
  {{- if $alone }}
  - name: RANK
    valueFrom: {fieldRef: {fieldPath: "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']"}}
  {{- end }}
  {{- include "loraplex.shardEnv" $root | nindent 2 }}
ports:
  - {name: grpc{{ if not $alone }}-{{ $rank }}{{ end }}, containerPort: {{ $port }}}
  - {name: metrics{{ if not $alone }}-{{ $rank }}{{ end }}, containerPort: {{ add $root.Values.metrics.shardPort $rank }}}
# The port opens once the model is loaded.
startupProbe:
  {{- include "loraplex.shardProbe" (list $root $port "") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: {{ div (add $shard.startupSeconds 4) 5 }}
readinessProbe:
  {{- include "loraplex.shardProbe" (list $root $port ", service: loraplex.shard.v1.ShardService") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
# Ranks can only begin together. In one pod each is probed at the next one's port, so that if one ends, all start again.
livenessProbe:
  {{- $next := $alone | ternary $port (add 50060 (mod (add $rank 1) $tp)) }}
  {{- include "loraplex.shardProbe" (list $root $next "") | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
volumeMounts:
  {{- include "loraplex.shardVolumeMounts" $root | nindent 2 }}
{{- end }}

{{/* (list $ port more): the kubelet cannot ask over mutual TLS */}}
{{- define "loraplex.shardProbe" -}}
{{- if (index . 0).Values.mtls.shardSecret -}}
tcpSocket: {port: {{ index . 1 }}}
{{- else -}}
grpc: {port: {{ index . 1 }}{{ index . 2 }}}
{{- end }}
{{- end }}

{{- define "loraplex.hasAdapters" -}}
{{- if or .Values.shard.adapters.existingClaim .Values.shard.adapters.configMaps }}yes{{ end }}
{{- end }}

{{- define "loraplex.shardEnv" -}}
- {name: HOME, value: /tmp}
- {name: HF_HOME, value: /cache}
{{- with .Values.shard.hub.endpoint }}
- {name: HF_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- with .Values.shard.hub.existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.shard.hub.key }}}}
{{- end }}
{{- with .Values.shard.adapters.s3 }}
{{- with .endpoint }}
- {name: AWS_ENDPOINT_URL_S3, value: {{ . | quote }}}
{{- end }}
{{- with .region }}
- {name: AWS_REGION, value: {{ . | quote }}}
{{- end }}
{{- with .existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_ACCESS_KEY_ID}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_SECRET_ACCESS_KEY}}
{{- end }}
{{- end }}
{{- if and (dig "limits" "cpu" "" .Values.shard.resources) (not (hasKey .Values.shard.settings "threads")) }}
# torch would count the node's cores.
- name: LORAPLEX_THREADS
  valueFrom: {resourceFieldRef: {resource: limits.cpu}}
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
- {name: adapter-{{ $index }}, mountPath: /adapters/{{ $adapter.id }}, readOnly: true}
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
- {name: cache, persistentVolumeClaim: {claimName: {{ $shard.modelCache.existingClaim }}}}
{{- else if not $shard.modelCache.persistent }}
- {name: cache, emptyDir: {sizeLimit: {{ $shard.modelCache.size }}}}
{{- end }}
{{- with $shard.modelImage.reference }}
- {name: model, image: {reference: {{ . | quote }}, pullPolicy: {{ $shard.modelImage.pullPolicy }}}}
{{- end }}
{{- with $shard.adapters.existingClaim }}
- {name: adapters, persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}}
{{- end }}
{{- range $index, $adapter := $shard.adapters.configMaps }}
- {name: adapter-{{ $index }}, configMap: {name: {{ $adapter.name }}}}
{{- end }}
{{- include "loraplex.mtlsVolume" (list . "shardSecret") }}
{{- with $shard.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "loraplex.shardPodSpec" -}}
{{ include "loraplex.podSpec" (list . "shard") | trim }}
{{- with .Values.shard.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
terminationGracePeriodSeconds: {{ add (ceil (index .Values.shard.settings "drain-seconds" | default 30)) 10 }}
volumes:
  {{- include "loraplex.shardVolumes" . | nindent 2 }}
{{- end }}

{{- define "loraplex.ranksInPod" -}}
{{- if eq .Values.shard.workload "StatefulSet" }}{{ include "loraplex.tp" . }}{{ else }}1{{ end }}
{{- end }}
