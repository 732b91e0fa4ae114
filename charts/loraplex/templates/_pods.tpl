{{/* The common parts of both components' pods. `component` is "router" or "shard". */}}

{{/* (list $ component selector): a pod's metadata */}}
{{- define "loraplex.podMetadata" -}}
{{- $root := index . 0 }}
{{- $component := index $root.Values (index . 1) }}
{{- with $component.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
labels:
  {{- index . 2 | nindent 2 }}
  {{- with $root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- if and (eq (index . 1) "router") $root.Values.gateway.inferencePool.enabled }}
  {{- include "loraplex.poolLabels" $root | nindent 2 }}
  {{- end }}
  {{- with $component.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* (list $ component SPEC): a pod's spec, from the component's own SPEC */}}
{{- define "loraplex.podSpec" -}}
{{- $root := index . 0 }}
{{- $component := index $root.Values (index . 1) }}
{{- $spec := merge (index . 2) (include "loraplex.commonPodSpec" . | fromYaml) }}
{{- include "loraplex.merged" (list $spec $component.podSpec) }}
{{- end }}

{{- define "loraplex.commonPodSpec" -}}
{{- $root := index . 0 }}
{{- $component := index $root.Values (index . 1) -}}
serviceAccountName: {{ include "loraplex.serviceAccountName" $root | quote }}
automountServiceAccountToken: false
{{/* Service links would set LORAPLEX_* variables, which would be taken for settings. */ -}}
enableServiceLinks: false
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml $root.Values.podSecurityContext | nindent 2 }}
{{- with $component.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $component.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $component.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $component.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $component.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- $selector := dict "labelSelector" (dict "matchLabels" (include "loraplex.selector" . | fromYaml)) }}
  {{- range $component.topologySpreadConstraints }}
  - {{ merge (dict) . $selector | toJson }}
  {{- end }}
{{- end }}
{{- end }}

{{/* (list $ component CONTAINER): a container, from the component's own CONTAINER */}}
{{- define "loraplex.container" -}}
{{- $root := index . 0 }}
{{- $component := index $root.Values (index . 1) }}
{{- $container := merge (index . 2) (include "loraplex.commonContainer" . | fromYaml) }}
{{- include "loraplex.merged" (list $container $component.containerSpec) }}
{{- end }}

{{- define "loraplex.commonContainer" -}}
{{- $root := index . 0 }}
{{- $component := index $root.Values (index . 1) -}}
image: {{ include "loraplex.image" (list $root $component.image) | quote }}
imagePullPolicy: {{ $component.image.pullPolicy }}
securityContext:
  {{- toYaml $root.Values.securityContext | nindent 2 }}
resources:
  {{- toYaml $component.resources | nindent 2 }}
{{- with $component.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* (list $ image). The registry in `global`, if there is one, replaces the image's own. */}}
{{- define "loraplex.image" -}}
{{- $root := index . 0 }}
{{- $image := index . 1 }}
{{- $repository := $image.repository }}
{{- with dig "imageRegistry" "" (default dict $root.Values.global) }}
{{- $repository = printf "%s/%s" (trimSuffix "/" .) (regexReplaceAll "^(localhost|[^/]*[.:][^/]*)/" $repository "") }}
{{- end }}
{{- if $image.digest -}}
{{ $repository }}@{{ $image.digest }}
{{- else -}}
{{ $repository }}:{{ default $root.Chart.AppVersion $image.tag }}
{{- end }}
{{- end }}

{{/* SETTINGS: the command's flags */}}
{{- define "loraplex.flags" -}}
{{- range $name, $value := . }}
{{- if not (kindIs "bool" $value) }}
{{- /* Numbers from files are floats, which would be written as 1e+06. */}}
- {{ kindIs "float64" $value | ternary (toJson $value) (toString $value) | printf "--%s=%s" $name | quote }}
{{- else if $value }}
- --{{ $name }}
{{- end }}
{{- end }}
{{- end }}

{{/* (list $ PORT): the address to listen on */}}
{{- define "loraplex.listen" -}}
{{ contains ":" (index . 0).Values.listen | ternary (printf "[%s]" (index . 0).Values.listen) (index . 0).Values.listen }}:{{ index . 1 }}
{{- end }}

{{/* (list $ "routerSecret" or "shardSecret"): flags, volume and mount of the certificates */}}
{{- define "loraplex.mtlsFlags" -}}
{{- if index (index . 0).Values.mtls (index . 1) }}
- --mtls-cert=/etc/loraplex/mtls/tls.crt
- --mtls-key=/etc/loraplex/mtls/tls.key
- --mtls-ca=/etc/loraplex/mtls/ca.crt
{{- end }}
{{- end }}

{{- define "loraplex.mtlsVolume" -}}
{{- with index (index . 0).Values.mtls (index . 1) }}
- {name: mtls, secret: {secretName: {{ . | quote }}, defaultMode: 0440}}
{{- end }}
{{- end }}

{{- define "loraplex.mtlsMount" -}}
{{- if index (index . 0).Values.mtls (index . 1) }}
- {name: mtls, mountPath: /etc/loraplex/mtls, readOnly: true}
{{- end }}
{{- end }}

{{/* Where object stores are, and their credentials. The context has `s3`, `gcs` and `azure`. */}}
{{- define "loraplex.storesEnv" }}
{{- with .s3 }}
{{- with .endpoint }}
- {name: AWS_ENDPOINT_URL_S3, value: {{ . | quote }}}
{{- end }}
{{- with .region }}
- {name: AWS_REGION, value: {{ . | quote }}}
{{- end }}
{{- with .existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: AWS_ACCESS_KEY_ID}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: AWS_SECRET_ACCESS_KEY}}
{{- end }}
{{- end }}
{{- with .gcs.existingSecret }}
- name: GOOGLE_SERVICE_ACCOUNT_KEY
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: GOOGLE_SERVICE_ACCOUNT_KEY}}
{{- end }}
{{- with .azure }}
{{- with .account }}
- {name: AZURE_STORAGE_ACCOUNT_NAME, value: {{ . | quote }}}
{{- end }}
{{- with .existingSecret }}
- name: AZURE_STORAGE_ACCOUNT_KEY
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: AZURE_STORAGE_ACCOUNT_KEY}}
{{- end }}
{{- end }}
{{- end }}
