{{/* Merges values that are fields of Kubernetes' objects into the chart's objects. */}}

{{/* (list MADE OVER): MADE with OVER's fields, as YAML. Maps are merged. Lists of named items are merged by name, and
     lists of mounts by path. Other lists and single values are replaced; null removes a field. */}}
{{- define "loraplex.merged" -}}
{{- (include "loraplex.mergedJson" . | fromJson).value | toYaml }}
{{- end }}

{{- define "loraplex.mergedJson" -}}
{{- $made := index . 0 }}
{{- $over := index . 1 }}
{{- $merged := $over }}
{{- if and (kindIs "map" $made) (kindIs "map" $over) }}
{{- $merged = deepCopy $made }}
{{- range $key, $value := $over }}
{{- if kindIs "invalid" $value }}
{{- $_ := unset $merged $key }}
{{- else if hasKey $made $key }}
{{- $_ := set $merged $key (include "loraplex.mergedJson" (list (get $made $key) $value) | fromJson).value }}
{{- else }}
{{- $_ := set $merged $key $value }}
{{- end }}
{{- end }}
{{- else if and (kindIs "slice" $made) (kindIs "slice" $over) }}
{{- $key := include "loraplex.mergeKey" (concat $made $over) }}
{{- if $key }}
{{- $merged = list }}
{{- $rest := $over }}
{{- range $item := $made }}
{{- range $other := $over }}
{{- if eq (get $item $key) (get $other $key) }}
{{- $item = (include "loraplex.mergedJson" (list $item $other) | fromJson).value }}
{{- $rest = without $rest $other }}
{{- end }}
{{- end }}
{{- $merged = append $merged $item }}
{{- end }}
{{- $merged = concat $merged $rest }}
{{- end }}
{{- end }}
{{- dict "value" $merged | toJson }}
{{- end }}

{{/* LIST: the key that identifies its items; empty if there is none */}}
{{- define "loraplex.mergeKey" -}}
{{- $known := "" }}
{{- range $key := list "name" "mountPath" }}
{{- $found := true }}
{{- range $item := $ }}
{{- $found = and $found (kindIs "map" $item) (hasKey $item $key) }}
{{- end }}
{{- $known = $found | ternary $key $known }}
{{- end }}
{{- $known }}
{{- end }}
