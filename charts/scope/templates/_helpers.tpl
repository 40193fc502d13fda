{{/*
What several templates say. Names are the same in every release: a cluster has one set of ScopeMeshes and of the
policies that guard them, so it has room for one Scope.
*/}}

{{/* The image that .image describes; its tag is that of this version of Scope unless it names one. */}}
{{- define "scope.image" -}}
{{- $tag := .image.tag | default .version -}}
{{ .image.repository }}{{ with $tag }}:{{ . }}{{ end }}{{ with .image.digest }}@{{ . }}{{ end }}
{{- end }}

{{- define "scope.labels" -}}
app.kubernetes.io/name: {{ . }}
app.kubernetes.io/part-of: scope
{{- end }}

{{- define "scope.selector" -}}
app.kubernetes.io/name: {{ . }}
{{- end }}

{{/* The environment variable with this cluster's name. */}}
{{- define "scope.clusterVariable" -}}
- name: SCOPE_CLUSTER
  valueFrom:
    configMapKeyRef:
      name: scope-cluster
      key: cluster
{{- end }}

{{/* Whether the registry is in another cluster. */}}
{{- define "scope.joins" -}}
{{ if .Values.registry.url }}true{{ end }}
{{- end }}

{{/* Whether the gateway runs here. */}}
{{- define "scope.serves" -}}
{{ if and .Values.operator.enabled .Values.gateway.enabled (not .Values.registry.url) }}true{{ end }}
{{- end }}

{{/*
The UDP ports of the reflectors, with a comma. Peers are told the ports that the operator listens on, so behind node
ports it listens on the same numbers.
*/}}
{{- define "scope.reflectorPorts" -}}
{{- $service := .Values.gateway.service -}}
{{- if ne $service.type "NodePort" -}}
7478,7479
{{- else if and $service.nodePorts.reflector1 $service.nodePorts.reflector2 -}}
{{ $service.nodePorts.reflector1 }},{{ $service.nodePorts.reflector2 }}
{{- else -}}
{{- fail "gateway.service.nodePorts: choose reflector1 and reflector2, since peers are told these ports before they connect" -}}
{{- end -}}
{{- end }}

{{/* Whether this cluster's API server is the registry, whose ScopePeers its agents write. */}}
{{- define "scope.agentsWriteHere" -}}
{{ if and .Values.agent.enabled (not .Values.registry.url) }}true{{ end }}
{{- end }}
