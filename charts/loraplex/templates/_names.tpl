{{/* Names and labels. Those with the argument (list $ N ...) belong to router N and its replicas. */}}

{{- define "loraplex.name" -}}
{{- default .Chart.Name .Values.nameOverride }}
{{- end }}

{{/* Begins with a letter and has no dots, as a Service's name must, whatever the release's name is. A name that is too
     long for the names built from it is cut off, and ends with a digest of the whole. */}}
{{- define "loraplex.fullname" -}}
{{- $name := include "loraplex.name" . }}
{{- $release := .Release.Name | lower | replace "." "-" }}
{{- $whole := printf "%s-%s" $release $name }}
{{- if .Values.fullnameOverride }}
{{- $whole = .Values.fullnameOverride }}
{{- else if not (regexMatch "^[a-z]" $release) }}
{{- $whole = printf "%s-%s" $name $release }}
{{- else if contains $name $release }}
{{- $whole = $release }}
{{- end }}
{{- if gt (len $whole) 40 }}
{{- $whole = printf "%s-%s" ($whole | trunc 31 | trimSuffix "-") (sha256sum $whole | trunc 8) }}
{{- end }}
{{- $whole }}
{{- end }}

{{- define "loraplex.routerName" -}}
{{ include "loraplex.fullname" . }}-router
{{- end }}

{{/* (list $ N): the name of router N's replicas. N may be a variable of the router's pod. */}}
{{- define "loraplex.shardName" -}}
{{ include "loraplex.fullname" (index . 0) }}-shard-{{ index . 1 }}
{{- end }}

{{/* (list $ component): the labels that select a component's pods */}}
{{- define "loraplex.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "loraplex.name" $root | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* (list $ N): selects router N's pod, which Kubernetes labels with its number */}}
{{- define "loraplex.routerSelector" -}}
{{ include "loraplex.selector" (list (index . 0) "router") }}
apps.kubernetes.io/pod-index: {{ index . 1 | quote }}
{{- end }}

{{/* (list $ N): selects the pods of router N's replicas */}}
{{- define "loraplex.shardSelector" -}}
{{ include "loraplex.selector" (list (index . 0) "shard") }}
loraplex/router: {{ index . 1 | quote }}
{{- end }}

{{/* (dict "root" $ "component" ... "name" ...), optionally with "labels" and "annotations": an object's metadata */}}
{{- define "loraplex.metadata" -}}
name: {{ .name | quote }}
namespace: {{ .root.Release.Namespace | quote }}
labels:
  {{- include "loraplex.selector" (list .root .component) | nindent 2 }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .root.Release.Service }}
  helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
  {{- with merge (dict) (default dict .labels) .root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (default dict .annotations) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "loraplex.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "loraplex.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}
