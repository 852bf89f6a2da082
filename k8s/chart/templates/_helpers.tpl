{{- define "modelfs.selector" -}}
app.kubernetes.io/name: modelfs
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "modelfs.labels" -}}
{{ include "modelfs.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}
