{{/* What the pods of both components have in common. All take (list $ component), metadata (list $ component N). */}}

{{- define "loraplex.podMetadata" -}}
{{- $root := index . 0 }}
{{- $component := index $root.Values (index . 1) }}
{{- with $component.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
labels:
  {{- include "loraplex.selectorOfOne" . | nindent 2 }}
  {{- with $root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with $component.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "loraplex.podSpec" -}}
{{- $root := index . 0 }}
{{- $component := index $root.Values (index . 1) }}
serviceAccountName: {{ include "loraplex.serviceAccountName" $root }}
automountServiceAccountToken: false
{{/* Links would put LORAPLEX_* variables of addresses where the settings look for theirs. */ -}}
enableServiceLinks: false
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml $root.Values.podSecurityContext | nindent 2 }}
{{- with $component.priorityClassName }}
priorityClassName: {{ . }}
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

{{/* The flags of `settings` */}}
{{- define "loraplex.flags" -}}
{{- range $name, $value := (index (index . 0).Values (index . 1)).settings }}
{{- if not (kindIs "bool" $value) }}
{{- /* Numbers that come from files are floats, which would be written as 1e+06. */}}
- {{ kindIs "float64" $value | ternary (toJson $value) (toString $value) | printf "--%s=%s" $name | quote }}
{{- else if $value }}
- --{{ $name }}
{{- end }}
{{- end }}
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
- {name: mtls, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- end }}

{{- define "loraplex.mtlsMount" -}}
{{- if index (index . 0).Values.mtls (index . 1) }}
- {name: mtls, mountPath: /etc/loraplex/mtls, readOnly: true}
{{- end }}
{{- end }}

{{- define "loraplex.container" -}}
{{- $root := index . 0 }}
{{- $component := index $root.Values (index . 1) -}}
image: {{ include "loraplex.image" (list $root $component.image) }}
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
