{{- /*
What all names begin with: letters first, no dots, as names of Services have
it, and short enough for what is added to it.
*/ -}}
{{- define "portpool.base" -}}
{{- $release := .Release.Name | replace "." "-" }}
{{- $name := printf "%s-portpool" $release }}
{{- if contains "portpool" $release }}
{{- $name = $release }}
{{- end }}
{{- if regexMatch "^[0-9]" $name }}
{{- $name = printf "portpool-%s" $release }}
{{- end }}
{{- default $name .Values.fullnameOverride | trunc 44 | trimSuffix "-" }}
{{- end }}

{{- define "portpool.name" -}}
{{ include "portpool.base" . }}-controller
{{- end }}

{{- define "portpool.serviceAccount" -}}
{{ default (ternary (include "portpool.name" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name }}
{{- end }}

{{- define "portpool.selector" -}}
app.kubernetes.io/name: portpool
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: controller
{{- end }}

{{- define "portpool.labels" -}}
{{- $ours := include "portpool.selector" . | fromYaml }}
{{- $_ := set $ours "app.kubernetes.io/part-of" "portpool" }}
{{- $_ := set $ours "app.kubernetes.io/version" .Chart.AppVersion }}
{{- $_ := set $ours "app.kubernetes.io/managed-by" .Release.Service }}
{{- $_ := set $ours "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") }}
{{- merge $ours .Values.commonLabels | toYaml }}
{{- end }}

{{- /* Metadata of an object, from a list: the context, and what its name ends with. */ -}}
{{- define "portpool.metadata" -}}
{{- $context := index . 0 -}}
name: {{ include "portpool.name" $context }}{{ index . 1 }}
namespace: {{ $context.Release.Namespace }}
labels: {{- include "portpool.labels" $context | nindent 2 }}
{{- end }}

{{- define "portpool.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- /* How pods of the image are pulled, and where they may run. */ -}}
{{- define "portpool.placement" -}}
{{- range $field := list "imagePullSecrets" "nodeSelector" "tolerations" }}
{{- with index $.Values $field }}
{{ dict $field . | toYaml }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What a controller does in a namespace whose pools it looks after. */ -}}
{{- define "portpool.rules" -}}
- apiGroups: [portpool.dev]
  resources: [processingpools]
  verbs: [get, list, watch]
- apiGroups: [portpool.dev]
  resources: [processingpools/status]
  verbs: [patch]
# For owner references that hold up the pool's deletion until the owned are gone.
- apiGroups: [portpool.dev]
  resources: [processingpools/finalizers]
  verbs: [update]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
# The table; reading it is also what the connection servers' Roles give on.
- apiGroups: [""]
  resources: [configmaps, serviceaccounts]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, watch, create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end }}
