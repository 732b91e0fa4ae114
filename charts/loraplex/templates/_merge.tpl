{{/* How values that are fields of Kubernetes' own objects come into what the chart makes. */}}

{{/* (list MADE OVER): MADE with OVER's fields, as YAML. Maps are merged; so are lists of things that have names (or, as
     mounts, paths), by name; other lists and single values are replaced, and null takes a field away. */}}
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

{{/* LIST: the key that all its items have and are known by; empty if there is none */}}
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
