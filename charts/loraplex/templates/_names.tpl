{{/* Names and labels. Those that take (list $ N ...) belong to the router of number N and to its groups. */}}

{{- define "loraplex.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "loraplex.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride }}
{{- else if contains (include "loraplex.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "loraplex.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* (list $ component): what pods of a component are selected by */}}
{{- define "loraplex.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "loraplex.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* (list $ component N): the same, of one router */}}
{{- define "loraplex.selectorOfOne" -}}
{{ include "loraplex.selector" . }}
loraplex/router: {{ index . 2 | quote }}
{{- end }}

{{/* (list $ component): the labels of an object */}}
{{- define "loraplex.labels" -}}
{{- $root := index . 0 -}}
{{ include "loraplex.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "loraplex.routerName" -}}
{{ include "loraplex.fullname" (index . 0) }}-router-{{ index . 1 }}
{{- end }}

{{- define "loraplex.shardName" -}}
{{ include "loraplex.fullname" (index . 0) }}-shard-{{ index . 1 }}
{{- end }}

{{- define "loraplex.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "loraplex.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* (list $ image) */}}
{{- define "loraplex.image" -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default (index . 0).Chart.AppVersion $image.tag }}
{{- end }}
{{- end }}
